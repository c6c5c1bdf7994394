"""A backend from outside is found by its entry point, verified as the others are, and touches nothing of moeopt."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import moeopt
from moeopt.backends import registry
from moeopt.backends.base import Backend
from moeopt.errors import BundleError, NotSaveableError, UsageError
from moeopt.pipeline.block import Runtime
from tests.toy_moe import H, build

TOY = Path(__file__).parent / "toy" / "numpy_backend.py"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs packages that consist of an entry point: ``installed(name, "module:attribute")``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._made.cache_clear()

    def install(name, value):
        info = tmp_path / f"{name}_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[moeopt.backends]\n{name} = {value}\n")

    yield install
    registry._made.cache_clear()


@pytest.fixture
def numpy(installed):
    installed("numpy", "tests.backends.toy.numpy_backend:NumpyBackend")


def test_it_optimises_and_is_verified(numpy):
    model = build()
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
    opt = moeopt.optimize(model, x, backend="numpy")
    assert opt.certificate.passed is True and opt.report.backend == "numpy"
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["rewritten"]
    assert opt.certificate.device.startswith("numpy ")
    for call in (x, torch.randn(1, H), torch.randn(40, H)):
        torch.testing.assert_close(opt(call), model(call), rtol=1e-5, atol=1e-6)
    assert moeopt.verify(opt, original=model).passed is True


def test_a_wrong_kernel_is_caught(numpy, monkeypatch):
    toy = sys.modules.get("tests.backends.toy.numpy_backend") or __import__(
        "tests.backends.toy.numpy_backend", fromlist=["x"]
    )
    right = toy.product
    monkeypatch.setattr(toy, "product", lambda x, w, b, layout: right(x, w, b, layout) * 1.001)
    opt = moeopt.optimize(build(), torch.randn(5, H), backend="numpy", verify="fast")
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert block.status == "declined" and "from the float64 oracle" in block.reason


def test_what_it_refuses(numpy, tmp_path):
    with pytest.raises(UsageError, match="device='cuda': NumPy computes on the CPU; leave device out"):
        moeopt.optimize(build(), torch.randn(5, H), backend="numpy", device="cuda")
    opt = moeopt.optimize(build(), torch.randn(5, H), backend="numpy", verify="off")
    with pytest.raises(NotSaveableError, match="backend 'numpy' has no bundle form: use the optimised model in this"):
        opt.save(tmp_path / "b")
    half = moeopt.optimize(build().half(), torch.randn(5, H).half(), backend="numpy", verify="fast")
    (block,) = [b for b in half.report.blocks if b.kind == "moe"]
    assert block.reason.startswith("the NumPy backend carries float32 experts")


def test_the_page_shows_this_backend():
    page = (Path(__file__).parents[2] / "docs" / "add-a-backend.md").read_text()
    (shown,) = re.findall(r'^```python title="numpy_backend.py"\n(.*?)^```', page, re.M | re.S)
    assert shown == TOY.read_text()


@pytest.mark.parametrize(("head", "of"), [("method", Backend), ("of the plan", Runtime)])
def test_the_page_names_every_public_method_of_a_backend_and_of_its_plan(head, of):
    page = (Path(__file__).parents[2] / "docs" / "add-a-backend.md").read_text()
    (table,) = re.findall(rf"^\| {head} \|.*?\n\n", page, re.M | re.S)
    told = {name for row in table.strip().splitlines()[2:] for name in re.findall(r"`(\w+)", row.split("|")[1])}
    assert told == {name for name in vars(of) if not name.startswith("_") and callable(vars(of)[name])}


def test_unknown_names():
    with pytest.raises(UsageError, match="backend 'onnx_runtime' is not available; did you mean 'onnxruntime'\\? use"):
        registry.get("onnx_runtime")
    with pytest.raises(UsageError, match=r"or install the package that brings it \(an entry point in the group moeopt"):
        registry.get("tvm")
    assert registry.names()[:3] == ("torch", "onnxruntime", "tensorrt")


def test_a_package_that_does_not_load(installed):
    installed("broken", "no_such_module_anywhere:Backend")
    with pytest.raises(UsageError, match=r"backend 'broken' \(no_such_module_anywhere:Backend\) does not load: Module"):
        registry.get("broken")


def test_a_package_that_brings_something_else(installed):
    installed("other", "collections:OrderedDict")
    with pytest.raises(UsageError, match="is a OrderedDict, not a moeopt.backends.base.Backend"):
        registry.get("other")


def test_moeopts_own_cannot_be_replaced(installed):
    installed("torch", "tests.backends.toy.numpy_backend:NumpyBackend")
    assert type(registry.get("torch")).__name__ == "TorchBackend"


class Nameless(Backend):
    """Says another name in its report."""

    name = "nameless"

    def _plan_impl(self, options):
        return None

    def _optimize_impl(self, source, call, options, plan):
        return registry.get("torch").optimize(source, call, options, plan)


def test_what_comes_back_is_checked(tmp_path):
    backend = Nameless()
    with pytest.raises(AssertionError, match="the backend 'nameless' returned a report of 'torch'"):
        backend.optimize(nn.Linear(2, 2), ((torch.ones(1, 2),), {}), moeopt.Options(), None)
    with pytest.raises(BundleError, match="backend 'nameless' opens no bundles"):
        backend.open(tmp_path)


@pytest.mark.one_isa
def test_a_bundle_of_another_backend_is_refused(toy_bundle):
    with pytest.raises(BundleError, match="it is a bundle for torch: use moeopt.verify"):
        registry.get("onnxruntime").verify(toy_bundle)


def test_nobody_else_asks_which_backend_it_is():
    """No line outside the backends branches on a backend's name or on an engine's class."""
    root = Path(moeopt.__file__).parent
    for path in root.rglob("*.py"):
        if path.is_relative_to(root / "backends"):
            continue
        text = path.read_text()
        assert not re.search(r"backend\s*(==|!=|in|not in)\s*[\"'(\[]", text), path
        assert not re.search(
            r"isinstance\([^)]*\b(OnnxEngine|GraphEngine|OfflineEngine|LoadedEngine|BuiltEngine)\b", text
        ), path
