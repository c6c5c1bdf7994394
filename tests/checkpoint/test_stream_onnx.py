"""A directory streamed into an engine of ONNX Runtime, and an engine that leaves its weights in their file."""

import json
import sys

import pytest
import torch

import moeopt
from moeopt.errors import UsageError
from moeopt.find.example_inputs import made_up
from tests import children

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 writes other checkpoints of these models", allow_module_level=True)

from tests.checkpoint.families import FAMILIES, write, write_remote  # noqa: E402


def test_the_engine_is_the_one_that_the_loaded_model_gives(tmp_path):
    write("qwen3", tmp_path / "model", shards=2)
    lines = []
    made = moeopt.optimize(
        tmp_path / "model", backend="onnxruntime", out=tmp_path / "b", verify="fast", progress=lines.append
    )
    assert made.certificate.passed and len(made.report.rewritten) == 2
    assert any("disk needed" in line for line in lines)
    said = " ".join(made.certificate.notes)
    assert "streamed: each block verified as the engine computes it, and the engine end to end: distance at" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    inputs = made_up(model, 0)[1]
    plain = moeopt.optimize(model, inputs, backend="onnxruntime", verify="fast")
    plain.save(tmp_path / "plain")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert moeopt.verify(tmp_path / "b").passed
    ids = inputs["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(moeopt.load(tmp_path / "b", mapped=True)(ids).logits, model(ids).logits)
    del made, plain
    assert {p.name for p in tmp_path.iterdir()} == {"model", "b", "plain"}


@pytest.mark.nightly
@pytest.mark.parametrize("family", [*(name for name in FAMILIES if name != "qwen3"), "remote"])
def test_each_family_streams_into_an_engine(family, tmp_path):
    remote = {"trust_remote_code": True} if family == "remote" else {}
    if remote:
        write_remote(tmp_path / "model")
    else:
        write(family, tmp_path / "model", shards=2)
    made = moeopt.optimize(tmp_path / "model", backend="onnxruntime", out=tmp_path / "b", verify="fast", **remote)
    assert made.certificate.passed and moeopt.verify(tmp_path / "b").passed
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", **remote).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 3]])
    with torch.no_grad():
        want = model(ids)
    got = moeopt.load(tmp_path / "b")(ids)
    torch.testing.assert_close(getattr(got, "logits", got), getattr(want, "logits", want), atol=1e-5, rtol=1e-4)


CHILD = """
import json, sys
import moeopt, onnxruntime, torch

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

moeopt.load(sys.argv[1], mapped=True)  # libraries have their buffers
before = anonymous()
engine = moeopt.load(sys.argv[1], mapped=sys.argv[2] == "mapped")
y = engine(torch.ones(4, 128))
print(json.dumps({"taken": anonymous() - before, "y": y[0, :4].tolist()}))
"""


def test_a_mapped_engine_takes_no_copy_of_its_weights(tmp_path):
    from tests.bundle.test_resident import EXPERT, E, Layers, rows

    torch.manual_seed(0)
    moeopt.optimize(Layers().eval(), rows(0, 16), backend="onnxruntime", verify="fast").save(tmp_path / "b")
    weights = 2 * E * EXPERT
    found = {}
    for how in ("mapped", "copied"):
        done = children.run([sys.executable, "-c", CHILD, str(tmp_path / "b"), how])
        assert done.returncode == 0, done.stderr[-2000:]
        found[how] = json.loads(done.stdout.splitlines()[-1])
    assert found["mapped"]["taken"] < weights // 2
    torch.testing.assert_close(torch.tensor(found["mapped"]["y"]), torch.tensor(found["copied"]["y"]))


def test_session_options_that_say_the_opposite(onnx_bundle):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "0")
    with pytest.raises(UsageError, match=r"mapped=True keeps weights in their file, and session_options set"):
        moeopt.load(onnx_bundle, session_options=options, mapped=True)
