"""Example inputs that show nothing, and paths and limits of another kind, are told."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moeopt
from moeopt.bundle.destination import check_destination
from moeopt.errors import BundleError, CaptureError, NotSaveableError, UsageError
from tests.test_cli import run
from tests.toy_moe import X, build


def test_inputs_without_a_value_are_told():
    made = moeopt.optimize(build(), X[:0], verify="fast")
    assert f"the example inputs hold no values ({tuple(X[:0].shape)})" in "".join(made.report.notes)
    assert not any("hold no values" in note for note in moeopt.explain(build(), X).notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_end_to_end_comparison_of_no_number_is_told(value):
    certificate = moeopt.optimize(build(), X * value, verify="fast").certificate
    assert certificate.passed  # blocks are verified on inputs of moeopt's own
    told = "tokens of an output is finite in the original (NaN or infinity), so no distance was compared"
    assert told in certificate.end_to_end.notes[0] and "is finite in the original" in " ".join(str(certificate).split())
    one = X.clone()
    one.view(-1, X.shape[-1])[0] = value
    assert not moeopt.optimize(build(), one, verify="fast").certificate.end_to_end.notes


def test_whole_numbers_for_floats_are_told():
    with pytest.raises(CaptureError, match=r"x holds whole numbers, int64, and the weights are floats: give x.float"):
        moeopt.optimize(build(), X.long())


@pytest.mark.parametrize("limits", [3, {"seconds": 3}, moeopt.LoadLimits])
def test_limits_of_another_kind(tmp_path, limits):
    path = moeopt.optimize(build(), X, verify="off").save(tmp_path / "b")
    for call in (moeopt.load, moeopt.verify):
        with pytest.raises(UsageError, match=r"is no LoadLimits: give one, like moeopt.LoadLimits\(seconds=60\)"):
            call(path, limits=limits)


def test_what_is_no_bundle_says_what_to_give(tmp_path):
    path = moeopt.optimize(build(), X, verify="off").save(tmp_path / "b")
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "hf").mkdir()
    shutil.make_archive(str(tmp_path / "b"), "gztar", path)
    (tmp_path / "hf" / "config.json").write_text("{}")
    for given, way in [
        (path / "moeopt.json", f"is no directory: it is not a bundle, .*: give the directory, {path}$"),
        (tmp_path / "m.onnx", r"becomes one by moeopt.optimize\('m.onnx'\).save\(directory\)"),
        (tmp_path / "hf", r"no moeopt.json: .*: the directory of a model becomes one by moeopt.optimize\(directory"),
        (tmp_path / "absent", "is no directory: .*: there is no such path$"),
        (tmp_path / "b.tar.gz", "is no directory: .*: unpack the archive, and give the directory in it$"),
        (tmp_path, f"has no moeopt.json: .*: give the directory in it, {path}$"),
    ]:
        with pytest.raises(BundleError, match=way):
            moeopt.load(given)


def test_a_certificate_that_is_none(tmp_path, capsys):
    path = moeopt.optimize(build(), X, verify="fast").save(tmp_path / "b")
    code, _, err = run(capsys, "verify", path, "--against", path)
    assert code == 2 and f"{path} is a directory: give a certificate, like {path}/certificate.json" in err
    code, _, err = run(capsys, "verify", path, "--against", path / "moeopt.json")
    assert code == 1 and "give a bundle's certificate.json, or what --json printed" in err


def test_a_name_moves_no_cursor(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (
        "from tests.toy_moe import X\nfrom tests.toy_moe import build as make\n\ndef build():\n    return make(), X\n"
    )
    (tmp_path / "mine.py").write_text(code)
    name = "caf\u00e9 \x1b[31mred\u202e"
    page = f"{name}.html"
    code, out, err = run(capsys, "optimize", "mine.py:build", "--verify", "fast", "--out", name, "--html", page)
    assert code == 0 and (tmp_path / name / "moeopt.json").is_file() and (tmp_path / page).is_file()
    assert "saved: caf\u00e9 " in out and not {"\x1b", "\u202e"} & {*out, *err}
    for expected in (0, 1):
        code, out, err = run(capsys, "verify", name)
        assert code == expected and not {"\x1b", "\u202e"} & {*out, *err}
        shutil.rmtree(tmp_path / name, ignore_errors=True)


@pytest.mark.parametrize("name", ["a" * 300, "nul\0here"])
def test_a_name_that_no_directory_can_have(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be written: .*; give another directory"):
        check_destination(tmp_path / name, verified=True)


def test_sizes_that_are_no_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=614_400))
    with pytest.raises(UsageError, match="needs about 2.70 MB, and 0.61 MB are free there: free some space"):
        check_destination(tmp_path / "b", verified=True, need_bytes=2_700_000)


def test_a_page_where_nobody_may_write_is_told_first(tmp_path, capsys, monkeypatch):
    def refuse(*given, **fields):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    code, out, err = run(capsys, "optimize", "nowhere.py:build", "--html", tmp_path / "x.html")
    assert code == 2 and not out
    assert f"x.html cannot be written: {os.strerror(errno.EROFS)} in {tmp_path}; give a file in a folder" in err


@pytest.mark.parametrize("name", ['q"uote', "two\nlines"])
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_module_whose_name_no_code_can_hold(tmp_path, name, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")

    class Out(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, build())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._modules[name](x)

    with pytest.raises(NotSaveableError, match=r"Out cannot be saved: the name .* holds a quotation mark or a line br"):
        moeopt.optimize(Out().eval(), X, backend=backend, verify="off").save(tmp_path / "b")


def test_a_file_beside_the_one_that_was_meant(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    code, _, err = run(capsys, "optimize", "hf/konfig.js")
    assert code == 2 and "hf/konfig.js: hf has no konfig.js; did you mean hf/config.json?" in err
