"""An ONNX Runtime bundle is saved, loaded, verified, copied and shared like any other."""

import copy
import dataclasses
import gc
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.backends.onnxrt import bundle as bundles
from moeopt.errors import BundleError, UsageError
from tests.backends.onnxrt.toys import H, call, net, optimized
from tests.backends.torch.toys import save as save_torch

pytestmark = pytest.mark.one_isa  # files, copies and processes

ROOT = Path(__file__).parents[3]


def same(one, two):
    assert torch.equal(one["x"], two["x"]) and all(map(torch.equal, one["states"], two["states"]))


def test_load_gives_what_was_saved(onnx_optimized, onnx_pristine):
    engine = moeopt.load(onnx_pristine)
    for size in ((2, 5), (3, 2), (4, 9)):
        same(engine(**call(*size)), onnx_optimized(**call(*size)))
    x, mask = call().values()
    same(engine(x, mask), engine(x=x, mask=mask))
    assert type(engine(x, mask)["states"]) is tuple
    assert engine.provider == "cpu" and engine.device == torch.device("cpu")
    assert engine.certificate["passed"] is True and repr(engine) == f"<moeopt engine {onnx_pristine} on cpu>"


def test_a_call_of_the_wrong_kind(onnx_pristine):
    engine, inputs = moeopt.load(onnx_pristine), call()
    with pytest.raises(UsageError, match="x is torch.float64, and the bundle takes torch.float32"):
        engine(inputs["x"].double(), inputs["mask"])
    with pytest.raises(UsageError, match="'mask' is missing"):
        engine(inputs["x"])
    with pytest.raises(UsageError, match="mask has size 4 in dimension 1, and another input has 5 there"):
        engine(inputs["x"], inputs["mask"][:, :4])
    with pytest.raises(UsageError, match="x has size 7 in dimension 2, and the bundle was exported for 8 only"):
        engine(inputs["x"][..., :7], inputs["mask"])


def test_verify_alone(onnx_pristine):
    certificate = moeopt.verify(onnx_pristine, provider="CPUExecutionProvider")
    assert certificate.passed and certificate.executed and certificate.device == "onnxruntime cpu"
    assert [b.name for b in certificate.blocks] == ["layers.0", "layers.1"]
    assert certificate.end_to_end.outputs >= 2 and "golden runs, worst distance per token 0.0e+00" in str(certificate)


def test_verify_with_the_original(onnx_pristine):
    certificate = moeopt.verify(onnx_pristine, original=net(), inputs=call(3, 4, seed=5))
    assert certificate.passed and certificate.device == "onnxruntime cpu" and certificate.end_to_end.tokens == 36
    assert moeopt.verify(onnx_pristine, original=net(seed=1), inputs=call()).passed is False
    with pytest.raises(UsageError, match="needs inputs= to run both on"):
        moeopt.verify(onnx_pristine, original=net())


def test_backends_are_told_apart(tmp_path, onnx_pristine):
    from moeopt.backends.onnxrt.bundle import load_onnx_bundle
    from moeopt.backends.torch.bundle import load_torch_bundle

    torch_bundle = save_torch(tmp_path / "t")
    with pytest.raises(BundleError, match="it is a bundle for torch: use moeopt.load"):
        load_onnx_bundle(torch_bundle)
    with pytest.raises(BundleError, match="it is a bundle for onnxruntime, not torch: use moeopt.load"):
        load_torch_bundle(onnx_pristine)
    assert moeopt.load(torch_bundle)(torch.zeros(2, H)).shape == (2, H)
    with pytest.raises(BundleError, match="has no moeopt.json"):
        moeopt.load(tmp_path)


def test_saved_twice_and_over(onnx_optimized, tmp_path):
    first, second = onnx_optimized.save(tmp_path / "a"), onnx_optimized.save(tmp_path / "b")
    assert (first / "model.onnx.data").read_bytes() == (second / "model.onnx.data").read_bytes()
    engine = moeopt.load(first)
    want = engine(**call())
    onnx_optimized.save(first)  # its files are replaced while an engine reads them
    same(engine(**call()), want)
    same(moeopt.load(first)(**call()), want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"], "nothing is left beside them"
    save_torch(second)
    assert moeopt.load(second)(torch.zeros(2, H)).shape == (2, H)


def test_a_failing_save_leaves_the_old_bundle(onnx_optimized, tmp_path, monkeypatch):
    bundle = onnx_optimized.save(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(bundles.goldens, "save_golden", full)
    with pytest.raises(OSError, match="no space left"):
        onnx_optimized.save(bundle)
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before and list(tmp_path.iterdir()) == [bundle]
    assert moeopt.verify(bundle).passed


def test_something_else_is_not_overwritten(onnx_optimized, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is not a moeopt bundle: it is left alone"):
        onnx_optimized.save(tmp_path)


def test_copies(onnx_optimized, onnx_pristine):
    for thing in (onnx_optimized, moeopt.load(onnx_pristine)):
        twin = copy.deepcopy(thing)
        same(twin(**call()), thing(**call()))
        same(copy.copy(thing)(**call()), thing(**call()))
    assert copy.deepcopy(onnx_optimized).save is not None


def test_pickling(onnx_optimized, onnx_pristine, tmp_path):
    with pytest.raises(UsageError, match="cannot be pickled: save it with .save"):
        pickle.dumps(onnx_optimized)
    with pytest.raises(UsageError, match="lies in a temporary folder and cannot be pickled: save it with .save"):
        pickle.dumps(onnx_optimized.model)
    bundle = shutil.copytree(onnx_pristine, tmp_path / "b")
    engine = moeopt.load(bundle)
    text = pickle.dumps(engine)
    assert len(text) < 1000, "the path, not the weights"
    same(pickle.loads(text)(**call()), engine(**call()))
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match="model.onnx: the file is missing"):
        pickle.loads(text)


def test_a_read_only_directory(onnx_pristine, tmp_path):
    bundle = shutil.copytree(onnx_pristine, tmp_path / "b")
    for path in (*bundle.iterdir(), bundle):
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    try:
        same(moeopt.load(bundle)(**call()), moeopt.load(onnx_pristine)(**call()))
    finally:
        os.chmod(bundle, 0o755)


def test_files_that_everyone_may_read(onnx_pristine):
    assert {oct(p.stat().st_mode & 0o777) for p in onnx_pristine.iterdir()} <= {"0o644", "0o664"}


def test_two_processes_read_one_bundle(onnx_pristine):
    code = (
        f"import moeopt; from tests.backends.onnxrt.toys import call; e = moeopt.load({str(onnx_pristine)!r}); "
        "print(e(**call())['x'].double().sum().item())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outs = [run.communicate(timeout=300)[0].strip() for run in runs]
    assert outs[0] == outs[1] == str(moeopt.load(onnx_pristine)(**call())["x"].double().sum().item())


@pytest.fixture
def short_lived():
    return optimized(seed=3)


def test_an_engine_outlives_its_owner_and_leaves_nothing(short_lived, request):
    engine, folder = short_lived.model, short_lived.model.directory
    want = engine(**call())
    shutil.rmtree(folder)  # as a cleaner of temporary folders does
    same(engine(**call()), want)
    with pytest.raises(UsageError, match="are gone: optimise the model again, then save it"):
        short_lived.save(folder.parent / "never")


def test_the_temporary_folder_goes_with_the_process():
    code = (
        "from tests.backends.onnxrt.toys import optimized; o = optimized(); e = o.model; del o; print(e.directory); "
        "import os; assert os.path.exists(e.directory)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() and not Path(run.stdout.strip()).exists() and "Warning" not in run.stderr


def test_the_temporary_folder_goes_with_the_engine(onnx_bundle):
    gc.collect()
    engine = moeopt.load(onnx_bundle)
    assert engine.directory == onnx_bundle, "a bundle that is right is run where it lies"


@dataclasses.dataclass
class Result:
    y: torch.Tensor
    twice: torch.Tensor


torch.export.register_dataclass(Result)


def test_a_model_that_returns_a_data_class(tmp_path):
    """The engine returns its fields, and is compared with the original, and with its golden runs, by them."""

    class InFields(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(4, 4)

        def forward(self, x):
            return Result(self.up(x), x * 2)

    model, x = InFields().eval(), torch.randn(3, 4)
    made = moeopt.optimize(model, x, backend="onnxruntime", verify="fast")
    assert made.certificate.passed and torch.equal(made(x).twice, x * 2)
    assert moeopt.verify(made.save(tmp_path / "b"), original=model, inputs=x).passed
