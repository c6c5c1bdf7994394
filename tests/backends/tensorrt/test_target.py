"""Targets by any spelling, packages that are missing, and what can be built where: each refusal by its text."""

import builtins
import importlib
import sys

import pytest
import torch

from moeopt.backends.tensorrt import product as products
from moeopt.backends.tensorrt import target as targets
from moeopt.backends.tensorrt.target import Target, check_buildable, local_target, parse_target, wanted_target
from moeopt.errors import UsageError


@pytest.mark.parametrize("text", ["sm_89", "SM89", "8.9", "89", 89, " sm_89 "])
def test_spellings(text):
    assert parse_target(text) == Target(89, "sm_89", "tensorrt_rtx") and str(parse_target(text)) == "sm_89"


def test_two_digit_generations_and_the_other_product():
    assert parse_target("12.0").sm == 120
    assert parse_target("sm_100").product == "tensorrt" and parse_target(90).product == "tensorrt"


@pytest.mark.parametrize("text", ["sm_99", "rtx4090", "8", "", "cuda", "sm_1200", None])
def test_an_unknown_target(text):
    with pytest.raises(UsageError) as err:
        parse_target(text)
    assert f"target {text!r} is not a compute capability that TensorRT builds for; the targets are sm_75" in str(
        err.value
    )
    assert "sm_121 (TensorRT for RTX, built on any machine) and sm_90, sm_100" in str(err.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which is the target then")
def test_no_target_and_no_gpu():
    assert local_target() is None
    with pytest.raises(UsageError, match="this machine has no GPU to take it from: give target=, one of sm_75, sm_80"):
        wanted_target(None)


def test_the_gpu_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert wanted_target(None).name == "sm_120" and wanted_target("sm_86").name == "sm_86"


def test_what_needs_its_own_gpu(monkeypatch):
    check_buildable(parse_target("sm_89"))
    monkeypatch.setattr(targets, "local_target", lambda: None)
    with pytest.raises(UsageError, match="engines for sm_100 on a GPU of that capability only, and this machine has"):
        check_buildable(parse_target("sm_100"))
    monkeypatch.setattr(targets, "local_target", lambda: parse_target("sm_89"))
    with pytest.raises(UsageError, match="this machine has a GPU of sm_89: run this there, or take a target that"):
        check_buildable(parse_target("sm_90"))
    monkeypatch.setattr(targets, "local_target", lambda: parse_target("sm_90"))
    check_buildable(parse_target("sm_90"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorrt_rtx", r"needs TensorRT for RTX, which is not installed: pip install 'moeopt\[tensorrt\]'"),
        (
            "tensorrt",
            "needs TensorRT, which is not installed: pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com",
        ),
    ],
)
def test_a_package_that_is_not_installed(name, words, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    real = importlib.import_module

    def absent(wanted, *rest):
        if wanted == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(wanted, *rest)

    monkeypatch.setattr(products.importlib, "import_module", absent)
    with pytest.raises(UsageError, match=f"backend 'tensorrt' {words}"):
        products.product(name)


def test_a_package_that_does_not_start(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UsageError, match=r"TensorRT, which does not start \(libnvinfer.so.10: cannot open"):
        products.product("tensorrt")


def test_the_packages_that_write_onnx(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "onnxscript":
            raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=r"backend 'tensorrt' needs onnxscript: pip install 'moeopt\[tensorrt\]'"):
        products.exporter_packages()


def test_the_installed_package():
    pytest.importorskip("tensorrt_rtx")
    found = products.product("tensorrt_rtx")
    assert found.version.split(".")[0].isdigit() and str(found) == f"tensorrt_rtx {found.version}"
    assert found.label == "TensorRT for RTX" and found.cuda is not None
