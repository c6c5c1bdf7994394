"""What a file is that is no model: by its name, and where many things have one name, by what is in it."""

import io
import pickle
import warnings
import zipfile

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from moeopt.other_files import file_hint
from tests.test_cli import run


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
