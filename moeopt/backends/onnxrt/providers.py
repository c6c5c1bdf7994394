"""Which ONNX Runtime this process has, and its execution providers by name."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence

import torch

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv_tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}


_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_OLDEST = (1, 31)
"""TopK of 1.30 ends the process where a row has a NaN: no engine could be verified there, or trusted."""


def runtime() -> PyObject:
    """The ``onnxruntime`` module.

    Raises:
        UsageError: none is installed, one that is too old, or two that overwrite each other's files.
    """
    homes = [home for home in map(_home, _PACKAGES) if home is not None]
    if len(homes) > len(set(homes)):  # in folders of their own, the first on the path is whole
        raise UsageError(
            f"onnxruntime and onnxruntime-gpu are both installed in {homes[0]} and overwrite each other's files: "
            "pip uninstall both, then install one of moeopt[onnxruntime] or moeopt[onnxruntime-gpu]"
        )
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise UsageError(f"backend 'onnxruntime' needs {err.name}: {_how_to_get_one()}") from None
    if tuple(map(int, re.findall(r"\d+", onnxruntime.__version__)[:2])) < _OLDEST:
        raise UsageError(
            "backend 'onnxruntime' needs ONNX Runtime 1.31 or newer (TopK of 1.30 ends the process where a router's "
            f"score is not a number), and {onnxruntime.__version__} is installed: {_how_to_get_one()}"
        )
    return onnxruntime


def _how_to_get_one() -> str:
    if sys.version_info < (3, 11):
        return "PyPI has no ONNX Runtime for Python 3.10 that is new enough: use a newer Python, or backend='torch'"
    return "pip install -U 'moeopt[onnxruntime]' (CPU) or 'moeopt[onnxruntime-gpu]'"


def _home(name: str) -> str | None:
    """The folder that a package's files were installed into; None where the package is not installed."""
    try:
        return os.path.realpath(str(importlib.metadata.distribution(name).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        return None


def provider_named(name: str | None) -> str:
    """``cpu``, ``cuda``, ... from any spelling (``CUDAExecutionProvider`` too); ``UsageError`` for an unknown one."""
    if name is None:
        return "cpu"
    short = str(name).split(":")[0].lower().removesuffix("executionprovider").replace("-", "_")
    short = {"nvtensorrtrtx": "nv_tensorrt_rtx", "trt": "tensorrt", "tensorrt_rtx": "nv_tensorrt_rtx"}.get(short, short)
    if short not in PROVIDERS:
        raise UsageError(f"provider {name!r} is unknown; the providers are {', '.join(PROVIDERS)}")
    return short


def available() -> list[str]:
    """The providers that can run on this machine: a GPU build lists its providers with no GPU there, too."""
    built = runtime().get_available_providers()
    gpu = torch.cuda.is_available()
    return [short for short, name in PROVIDERS.items() if name in built and (short == "cpu" or gpu)]


def why_absent(names: Sequence[str], alone: bool = True) -> dict[str, str]:
    """Each of the providers ``names``, and why it is not on this machine ("" where it is).

    Args:
        alone: whether nothing but these could run what is asked about.

    Raises:
        UsageError: ONNX Runtime is not installed, and ``alone``: nothing would be checked, which must not look like
            success.
    """
    try:
        there, missing = available(), ""
    except UsageError as err:
        if alone:
            raise
        there, missing = [], str(err)
    absent = {n: missing or f"ONNX Runtime has no {PROVIDERS[n]} on this machine, or no GPU for it" for n in names}
    return {name: "" if name in there else why for name, why in absent.items()}
