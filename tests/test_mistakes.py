"""Mistakes that users make, on the command line and in Python: each is one sentence that helps, and never a traceback.

The model is a few hundred numbers; what a mistake costs is told from whether the model's factory ran.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import moeopt
from moeopt.cli import main
from moeopt.errors import MoeoptError
from tests.backends.torch.toys import H, build, save

FACTORY = """
import pathlib
import torch
from tests.backends.torch.toys import H, build

def model():
    pathlib.Path("loaded").touch()
    return build(), torch.randn(3, H)

def wrong_width():
    return build(), torch.randn(3, H + 1)

def no_inputs():
    return build(), "three tokens"

def training():
    raise RuntimeError("CUDA out of memory")

def pair_of_models():
    return [build(), build()]

def branchy():
    class Branchy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            from examples.quickstart import TwoOfEight
            self.mlp = TwoOfEight(H, 16, 4)
        def forward(self, x):
            y = self.mlp(x)
            return y * 2 if y.sum() > 0 else y
    return Branchy().eval(), torch.randn(3, H)
"""
GPU = torch.cuda.is_available()

EARLY = [
    (["--backend", "ort"], "backend 'ort' is not available; did you mean 'onnxruntime'? use one of 'torch'"),
    (["--backend", "onnx"], "did you mean 'onnxruntime'?"),
    (["--backend", "ONNX-Runtime"], "did you mean 'onnxruntime'?"),
    (["--backend", "trt"], "did you mean 'tensorrt'?"),
    (["--backend", "pytorch"], "did you mean 'torch'?"),
    (["--backend", "cuda-graphs"], "backend 'cuda-graphs' is not available; use one of 'torch', 'onnxruntime'"),
    (["--backend", "tensorrt"], "target"),
    (["--device", "gpu"], "device='gpu' is not a device: give one like 'cpu' or 'cuda:0'"),
    (["--device", "meta"], "device='meta' keeps no values, and so nothing can be verified on it"),
    pytest.param(
        ["--device", "cuda"], "device='cuda': this machine has no CUDA GPU",
        marks=pytest.mark.skipif(GPU, reason="this machine has a CUDA GPU"),
    ),
    (["--device", "cuda:99"], "device='cuda:99': this machine has"),
    (["--dtype", "int8"], "dtype='int8' is not a floating-point dtype: give one like torch.bfloat16, 'bfloat16' or"),
    (["--dtype", "bfloat"], "dtype='bfloat' is not a floating-point dtype"),
    (["--verify", "paranoid"], "verify='paranoid': it must be one of strict, fast, off"),
    (["--seed", "-1"], "seed=-1: it must be a whole number, 0 or more"),
    (["--skip-passes", "grup_experts"], "did you mean 'group_experts'?"),
    (["--only-passes", "fold"], "names 'fold', which is no pass"),
    (["--task", "text-generation"], "is a factory: leave it out"),
    (["--task", "chat"], "--task chat is none: it may be text-generation"),
    (["--out", "afile"], "afile exists and is not a directory: give a new path"),
    (["--out", "afile/bundle"], "afile is a file; give another directory"),
    (["--out", "/proc/moeopt/bundle"], "/proc/moeopt/bundle cannot be written: "),
    (["--out", "full"], "full exists and is not a moeopt bundle: it is left alone, give a new path"),
    (["--out", "verified", "--verify", "off"], "verified holds a verified bundle (MoE for torch, verified), and what"),
    (["--html", "nowhere/report.html"], "nowhere/report.html cannot be written: there is no folder nowhere"),
    (["--html", "full"], "full is a folder: give the name of a file"),
    (["--measure"], "--measure adds to the page of --html"),
    (["--target", "cuda:8"], "target"),
]  # fmt: skip


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A verified bundle that no test writes to."""
    bundle = save(tmp_path_factory.mktemp("mistakes") / "verified")
    (bundle / "certificate.json").write_text(json.dumps({"passed": True}))
    manifest = json.loads((bundle / "moeopt.json").read_text())
    (bundle / "moeopt.json").write_text(json.dumps(manifest | {"source": {"class": "MoE"}}))
    return bundle


@pytest.fixture
def here(tmp_path, monkeypatch, verified):
    """The working directory: a factory, a file, a directory that is no bundle, and a verified bundle."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "afile").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    shutil.copytree(verified, tmp_path / "verified")
    yield tmp_path
    sys.modules.pop("mine", None)


def run(capsys, *words):
    """(exit code, stdout, stderr) of a command; anything but an exit would be a traceback for its user."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


@pytest.mark.parametrize(("words", "text"), EARLY, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_wrong_word_is_told_before_the_model_is_loaded(capsys, here, words, text):
    code, out, err = run(capsys, "optimize", "mine.py:model", *words)
    assert (code, out) == (2, "") and text in err and err.startswith("moeopt: ")
    assert not (here / "loaded").exists(), "the model was loaded first"
    assert sorted(p.name for p in here.iterdir() if p.name != "__pycache__") == ["afile", "full", "mine.py", "verified"]


LATE = [
    (["optimize", "mine.py:wrong_width"], 1, "shapes cannot be multiplied"),
    (["optimize", "mine.py:no_inputs"], 2, "example_inputs is a str; give a tensor, a tuple of positional arguments"),
    (["optimize", "mine.py:training"], 2, "mine.py:training: the factory raised RuntimeError: CUDA out of memory"),
    (["optimize", "mine.py:pair_of_models"], 2, "returned list, not a model"),
    (["optimize", "mine.py:modell"], 2, "mine.py has no function 'modell'"),
    (["optimize", "mien.py:model"], 2, "there is no file mien.py"),
    (["optimize", "mine.py"], 2, "mine.py is a file of code without the name of a factory in it, as in mine.py:build"),
    (["optimize", "afile"], 2, "afile is a file of none of the forms that moeopt reads"),
    (["optimize", "verified"], 2, "verified is a bundle, optimised already: `moeopt verify verified` checks it"),
    (["optimize", "full"], 2, "full is a directory without config.json"),
    (["verify", "nowhere"], 1, "nowhere is no directory"),
    (["verify", "full"], 1, "full"),
    (["verify", "verified", "--provider", "npu"], 1, "verified"),
    (["info", "nowhere"], 1, "nowhere"),
    (["profile", "verified"], 2, "verified is a bundle, whose graph hides its routing"),
    (["profile", "mine.py:model", "--data", "mine.py"], 2, "--data mine.py: give module:function or file.py:function"),
    (["inspect", "nowhere"], 2, "nowhere"),
    (["explain", "nowhere"], 2, "nowhere is neither a file nor module:factory"),
]


@pytest.mark.parametrize(("words", "code", "text"), LATE, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_only_the_model_tells_is_one_sentence(capsys, here, words, code, text):
    got, out, err = run(capsys, *words, "--quiet") if words[0] in ("optimize", "explain") else run(capsys, *words)
    assert (got, out) == (code, "") and text in err and "Traceback" not in err, err


def test_a_failed_save_loses_neither_report_nor_page(capsys, here):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    words = ["optimize", "mine.py:branchy", "--verify", "fast", "--out", "b", "--html", "opt.html", "--quiet"]
    code, out, err = run(capsys, *words)
    assert code == 1 and "1 block found: 1 rewritten" in out and "moeopt certificate: PASSED" in out
    assert "<html" in (here / "opt.html").read_text() and "html: opt.html" in out
    assert "saved:" not in out and not (here / "b").exists() and err.startswith("moeopt: ")
    code, out, _ = run(capsys, *words[:-3], "--quiet", "--json")
    said = json.loads(out)
    assert code == 1 and said["saved"] is None and "branchy" in said["not_saved"].lower()


def test_a_full_disk_is_one_sentence(capsys, here, monkeypatch):
    import safetensors.torch

    def full(*args, **fields):
        raise OSError(28, "No space left on device", "b/weights.safetensors")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, out, err = run(capsys, "optimize", "mine.py:model", "--verify", "off", "--out", "b", "--quiet")
    assert (
        code == 1
        and "moeopt certificate" in out
        and err == "moeopt: No space left on device: free some space, and call again: b/weights.safetensors\n"
    )
    assert not (here / "b").exists()


def test_too_little_space_is_told_first(here, monkeypatch):
    import shutil

    from moeopt.bundle.destination import check_destination

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2_000_000_000))
    with pytest.raises(
        MoeoptError, match=r"b needs about 61.00 GB, and 2.00 GB are free there: free some space, or give"
    ):
        check_destination("b", True, need_bytes=61_000_000_000)


def test_a_command_says_which_bundle_it_replaced_also_when_it_is_quiet(capsys, here):
    words = ["optimize", "mine.py:model", "--verify", "fast", "--out", "b", "--quiet"]
    assert run(capsys, *words)[1].endswith("\nsaved: b\n")
    said = run(capsys, *words)[1].splitlines()[-1]
    assert said.startswith("saved: b, in the place of the bundle that was there (") and said.endswith(", verified)")


def test_a_verified_bundle_is_not_replaced_by_an_unverified_one(here, caplog):
    good = moeopt.optimize(build(), torch.randn(3, H), verify="fast")
    bad = moeopt.optimize(build(), torch.randn(3, H), verify="off")
    good.save("b")
    with pytest.raises(MoeoptError, match=r"b holds a verified bundle .* and what would replace it is not verified"):
        bad.save("b")
    assert moeopt.verify("b").passed and "replaced" not in caplog.text
    good.save("b")
    assert "b: replaced the bundle that was there (" in caplog.text and ", verified)" in caplog.text
    bad.save("b", overwrite=True)
    assert moeopt.load("b").certificate["passed"] is None


X = torch.randn(3, H)
API = [
    (lambda: moeopt.optimize(build(), X, backend="ort"), "did you mean 'onnxruntime'?"),
    (lambda: moeopt.optimize(build(), X, backend=3), "backend 3 is not available; use one of 'torch'"),
    (lambda: moeopt.optimize(build(), X, device="cuda:99"), "device='cuda:99': this machine has"),
    (lambda: moeopt.optimize(build(), X, device="meta"), "device='meta' keeps no values"),
    (lambda: moeopt.optimize(build(), X, dtype="int4"), "dtype='int4' is not a floating-point dtype"),
    (lambda: moeopt.optimize(build(), X, dtype=torch.int8), "dtype=torch.int8 is not a floating-point dtype"),
    (lambda: moeopt.optimize(build(), X, progress="yes"), "progress='yes': it must be"),
    (lambda: moeopt.optimize(build(), 3), "example_inputs is a int; give a tensor"),
    (lambda: moeopt.optimize(build(), "hello"), "example_inputs is a str; give a tensor"),
    (lambda: moeopt.optimize(build(), {"y": X}), "unexpected keyword argument 'y'; check that it runs on these inputs"),
    (lambda: moeopt.optimize(build(), (X, X)), "only supports boolean masks"),
    (
        lambda: moeopt.optimize("mistral", X),
        "mistral is no directory: give a model, or the directory of",
    ),
    (lambda: moeopt.optimize(nn.Linear, X), "model is a type; give an nn.Module"),
    (lambda: moeopt.optimize(build(), X.long()), "mat1 and mat2 must have the same dtype"),
    (lambda: moeopt.optimize(build(), X, hints={"nope*": lambda m: None}), "hints['nope*'] matches no block"),
    (
        lambda: moeopt.optimize(build(), X, verify="off").save(3),
        "give the directory of the bundle, a string or a path, not a int: opt.save('engine')",
    ),
    (
        lambda: moeopt.optimize(build(), X, verify="off").save(None),
        "give the directory of the bundle, a string or a path, not a NoneType",
    ),
    (
        lambda: moeopt.optimize(build(), X, verify="off").save(b"x"),
        "give the directory of the bundle, a string or a path, not a bytes",
    ),
    (lambda: moeopt.load("nowhere"), "nowhere is no directory"),
    (lambda: moeopt.load(3), "moeopt.load takes the directory of a bundle, a string or a path, and no int"),
    (
        lambda: moeopt.load(moeopt.optimize(build(), X, verify="off")),
        "and no Optimized: it is called as it is, and .save(directory) writes a bundle",
    ),
    (lambda: moeopt.load("~/b"), f"there is no such path; nothing expands ~ here: give {Path.home() / 'b'}"),
    (lambda: moeopt.optimize("~/b"), f"; nothing expands ~ here: give {Path.home() / 'b'}"),
    (
        lambda: moeopt.optimize(build(), X, verify="off").save("~/b"),
        f"~/b would be a folder of that name; nothing expands ~ here: give {Path.home() / 'b'}",
    ),
    (
        lambda: moeopt.verify(moeopt.optimize(build(), X, verify="off"), original="b"),
        "original= is a str: give the model itself, or the .onnx file that the engine was made of",
    ),
    (
        lambda: moeopt.verify(moeopt.optimize(build(), X, verify="off"), original=nn.Linear(3, 3)),
        "Linear raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (3x8 and 3x3); check that it runs",
    ),
    (
        lambda: moeopt.optimize(build(), X, verify="off").report.to_html(None),
        "give the name of a file, like 'report.html', and no NoneType",
    ),
    (lambda: moeopt.verify("nowhere"), "nowhere is no directory"),
    (lambda: moeopt.verify(build()), "give the directory of a bundle, or what moeopt.optimize returned, not a Toy"),
    (lambda: moeopt.inspect("nowhere"), "nowhere"),
]


@pytest.mark.parametrize("number", range(len(API)))
def test_a_mistake_in_python_is_one_of_moeopts_errors(here, number):
    call, text = API[number]
    with pytest.raises(MoeoptError) as told:
        call()
    assert text in str(told.value) and str(told.value)


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("half", torch.float16), ("FP32", torch.float32)],
)
def test_short_names_of_dtypes(word, dtype):
    assert moeopt.Options(dtype=word).dtype is dtype


def test_closing_the_pipe_is_no_traceback(here):
    words = [sys.executable, "-m", "moeopt", "passes"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(" ".join(words) + " | head -n 1", shell=True, capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr
