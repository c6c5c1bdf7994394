"""What a file is that is no model: by its name, and where many things have one name, by what is in it."""

import io
import pickle
import re
import warnings
import zipfile

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from moeopt.other_files import file_hint, other_weights
from tests.test_cli import run
from tests.test_hugging_face import make


class Home(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Home()).save(str(path))


def compiled(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/aotinductor/model/model.so", b"")


STATE = nn.Linear(2, 2).state_dict()
MADE = {
    "state.pt": (lambda path: torch.save(STATE, path), "weights without code: make the model, model.load_state"),
    "steps.ckpt": (lambda path: torch.save({"model": STATE, "step": 3}, path), "weights without code"),
    "old.bin": (lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False), "weights without code"),
    "whole.pt": (
        lambda path: torch.save(nn.Sequential(nn.Linear(2, 2)), path),
        r"a pickle of torch.nn.modules.container.Sequential objects: torch.load\('whole.pt', weights_only=False\)",
    ),
    "home.pth": (
        lambda path: torch.save(Home(), path),
        r"a pickle of tests.*Home objects: .*you trust",
    ),
    "script.pt": (scripted, "a TorchScript archive, in which the Python modules are no more: give the nn.Module"),
    "program.pt2": (
        lambda path: torch.export.save(torch.export.export(Home(), (torch.ones(2),)), path),
        r"an exported program: torch.export.load\('program.pt2'\) gives it back; in Python, give that",
    ),
    "package.pt2": (compiled, "a package of AOTInductor, compiled already: give the model that it was made of$"),
    "flax_model.msgpack": (
        lambda path: path.write_bytes(b"?"),
        "Flax, which transformers 4 reads: with pip",
    ),
    "no_zip.pt": (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "weights without code"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_file_is_told_by_what_is_in_it(tmp_path, capsys, name):
    make, text = MADE[name]
    make(tmp_path / name)
    with pytest.raises(UsageError, match=text):
        moeopt.optimize(tmp_path / name)
    with pytest.raises(UsageError, match=text):
        moeopt.inspect(tmp_path / name)
    told = file_hint(tmp_path / name)
    for command in ("optimize", "explain", "profile", "inspect"):
        code, out, err = run(capsys, command, tmp_path / name)
        assert code == 2 and not out and told in err, command


def test_nothing_of_a_file_is_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    body = io.BytesIO()
    pickle.Pickler(body, protocol=2).dump(Bad())
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("bad/data.pkl", body.getvalue())
    assert "a pickle of " in file_hint(tmp_path / "bad.pt") and not (tmp_path / "ran").exists()


IN_FOLDERS = {
    "adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "is an adapter, which changes another model",
    ),
    "diffusers": (["model_index.json"], "is a pipeline of diffusers, of several models: load the one with the experts"),
    "makers": (["params.json", "consolidated.00.pth"], "is a model in its maker's own form: convert it to that of tr"),
    "parent": (
        ["run/config.json", "other/config.json"],
        r"model's directory in it: give \S+other, \S+run",
    ),
    "cache": (
        ["snapshots/abc/config.json"],
        r"with the model's directory in it: give \S+cache/snapshots/abc",
    ),
    "onnx": (["model.onnx"], "is a directory with an ONNX model in it: give the file, .*onnx/model.onnx"),
    "gguf": (["model.gguf"], "is a directory without config.json, and model.gguf in it is a GGUF file"),
    "bare": (
        ["model.safetensors"],
        "has weights and no config.json, which says how they are used: add the",
    ),
    "state": (
        ["pytorch_model.bin"],
        "has weights and no config.json, which says how they are used: add the",
    ),
}


@pytest.mark.parametrize("name", IN_FOLDERS)
def test_a_directory_that_is_no_models_is_told_by_what_is_in_it(tmp_path, capsys, name):
    files, text = IN_FOLDERS[name]
    for file in files:
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_bytes(b"{}")
    with pytest.raises(UsageError, match=text):
        moeopt.optimize(tmp_path / name)
    code, _, err = run(capsys, "optimize", tmp_path / name)
    assert code == 2 and re.search(text, err)
    if name != "bare":  # a header of two bytes is damage
        with pytest.raises(UsageError, match=text) if name != "adapter" else pytest.raises(moeopt.MoeoptError):
            moeopt.inspect(tmp_path / name)


@pytest.mark.parametrize("file", ["tf_model.h5", "flax_model.msgpack", "model.gguf", "consolidated.00.pth"])
def test_weights_in_another_form_are_not_replaced_by_random_ones(tmp_path, capsys, file):
    make().config.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(b"?")
    code, out, err = run(capsys, "optimize", tmp_path / "model", "--out", tmp_path / "b")
    assert code == 1 and not out and not (tmp_path / "b").exists()
    assert f"random numbers are not meant here: *.safetensors and pytorch_model*.bin are read, and {file} is " in err


def test_what_a_trainer_leaves_is_no_model(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        (tmp_path / name).touch()
    assert other_weights(tmp_path) is None
