"""What does not become the model is told before a weight is read, with the name of the tensor and the way out."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeopt
from moeopt.checkpoint.load import _Slice
from moeopt.errors import CheckpointError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 takes tensors, not what stands for them", allow_module_level=True)

from tests.checkpoint.families import FAMILIES, write  # noqa: E402

EXPERT, ROUTER = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.gate.weight"


@pytest.fixture
def model(tmp_path):
    return write("qwen3", tmp_path / "model")


def changed(model, change):
    """The directory with ``change`` made to its tensors."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    os.unlink(file)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def refused(model, words, monkeypatch, capfd, **fields):
    """``optimize`` ends in ``words`` with no weight read, nothing left behind, and no report of transformers' own."""
    read = []
    monkeypatch.setattr(_Slice, "__getitem__", lambda self, index: read.append(self._name))
    with pytest.raises(CheckpointError, match=words):
        moeopt.optimize(model, out=model.parent / "b", **fields)
    assert not read and [path.name for path in model.parent.iterdir()] == ["model"]
    told = capfd.readouterr().err
    assert "LOAD REPORT" not in told and "Traceback" not in told


@pytest.mark.parametrize("name", [ROUTER, "model.embed_tokens.weight"])
def test_a_weight_that_no_file_holds(model, monkeypatch, capfd, name):
    """Told before anything is read, and not drawn at random meanwhile: of a large model that takes all memory."""
    drawn = []
    normal = torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda t, *given, **fields: drawn.append(t.device.type) or normal(t, *given, **fields)
    )
    changed(model, lambda t: t.pop(name))
    refused(model, rf"holds no values for {name} of Qwen3MoeForCausalLM, and random numbers", monkeypatch, capfd)
    assert set(drawn) <= {"meta"}


def put(name, make):
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(EXPERT), rf"cannot be put together; {EXPERT} is not there, and 3 like it are\): config"),
        (put(EXPERT, lambda w: w[:8]), rf"together; {EXPERT} is \[8, 32\], and 3 like it are \[16, 32\]\): config"),
        (put(ROUTER, lambda w: w[:3]), rf"\({ROUTER} is \[3, 32\] in the files and \[4, 32\] by config.json\): config"),
    ],
)  # fmt: skip
def test_experts_that_are_not_whole_and_other_shapes(model, monkeypatch, capfd, change, words):
    changed(model, change)
    refused(model, words, monkeypatch, capfd)


@pytest.mark.parametrize("verbosity", ["error", "info"])
def test_what_transformers_would_log_is_heard_at_every_verbosity(model, monkeypatch, capfd, verbosity):
    """TRANSFORMERS_VERBOSITY=error keeps its report from being logged; what stands in it is told all the same."""
    before = transformers.logging.get_verbosity()
    getattr(transformers.logging, f"set_verbosity_{verbosity}")()
    try:
        changed(model, lambda t: t.pop(EXPERT))
        refused(model, rf"cannot be put together; {EXPERT} is not there, and 3 like", monkeypatch, capfd)
    finally:
        transformers.logging.set_verbosity(before)


def test_loading_ends_in_the_same_words(model, monkeypatch):
    """Where the rehearsal says nothing, the real load does, and points at no report that is not shown."""
    from moeopt.checkpoint import stream

    monkeypatch.setattr(stream, "rehearse", lambda *given: None)
    changed(model, lambda t: t.pop(EXPERT))
    with pytest.raises(CheckpointError, match=rf"cannot be put together; {EXPERT} is not there, and 3") as told:
        moeopt.optimize(model, out=model.parent / "b")
    assert "report" not in str(told.value)
    changed(model, put(ROUTER, lambda w: w[:3]))
    with pytest.raises(CheckpointError, match="do not become a Qwen3MoeForCausalLM"):
        moeopt.optimize(model, out=model.parent / "b")


@pytest.mark.parametrize("name", [EXPERT, ROUTER])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.bool])
def test_integers_are_no_weights(model, monkeypatch, capfd, name, dtype):
    """A quantised checkpoint whose config.json was fetched from elsewhere: casting its codes gives wrong numbers."""
    changed(model, put(name, lambda w: w.to(dtype)))
    words = (
        rf"the tensor '{name}' holds {str(dtype)[6:]}: no values of model.layers.1.mlp.* fetch config.json again, or"
    )
    refused(model, words, monkeypatch, capfd)


def test_eight_bit_floats_beside_their_scale(model, monkeypatch, capfd):
    changed(model, put(EXPERT, lambda w: w.to(torch.float8_e4m3fn)))
    made = moeopt.optimize(model, verify="off")  # floats with no scale are what they are
    assert len(made.report.rewritten) == 2
    scale = EXPERT.replace("weight", "weight_scale_inv")
    changed(model, lambda t: t.__setitem__(scale, torch.ones(1)))
    refused(model, rf"holds float8_e4m3fn with {scale} beside them: no values of", monkeypatch, capfd)


def test_a_config_of_another_model(model, monkeypatch, capfd):
    words = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**words, "num_experts": 5, "num_local_experts": 5}))
    refused(model, r"is \[4, .* in the files and \[5, .* by config.json, and 5 more\)", monkeypatch, capfd)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoints_pass(tmp_path, family, monkeypatch):
    from moeopt.checkpoint import stream

    class Read(Exception):
        pass

    def load(*given):
        raise Read

    monkeypatch.setattr(stream, "_load", load)  # what comes after the rehearsal
    with pytest.raises(Read):
        moeopt.optimize(write(family, tmp_path / "model", shards=2))


@pytest.mark.parametrize("words", [["profile", "--no-measure"], ["optimize", "--measure", "--html", "page.html"]])
def test_a_command_that_loads_the_whole_model_is_told_the_same(model, monkeypatch, capsys, words):
    """transformers alone would cast the codes to floats, and say nothing."""
    from tests.test_cli import run

    changed(model, put(EXPERT, lambda w: w.to(torch.int8)))
    monkeypatch.chdir(model.parent)
    code, out, err = run(capsys, words[0], model, *words[1:])
    assert code == 1 and not out and not (model.parent / "page.html").exists()
    assert f"the tensor '{EXPERT}' holds int8: no values of model.layers.1.mlp" in err and "Traceback" not in err
