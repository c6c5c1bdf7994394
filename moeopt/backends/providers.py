"""What could run a bundle, and why that is not on this machine."""

from __future__ import annotations

import os

import torch

from moeopt.backends.onnxrt.session import PROVIDERS, available
from moeopt.backends.tensorrt.bundle import THROUGH_ONNX, needs_of
from moeopt.backends.tensorrt.engine import here
from moeopt.backends.tensorrt.runtime import lacking
from moeopt.bundle.manifest import read_backend, read_manifest
from moeopt.errors import UsageError

_NAMES = {"torch": ("cpu", "cuda"), "onnxruntime": tuple(PROVIDERS), "tensorrt": ("cuda", "cpu", *THROUGH_ONNX)}


def provider_names(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """The providers that a bundle may be verified on, here or elsewhere; ``BundleError`` where there is no bundle."""
    return _NAMES[read_backend(directory)]


def providers(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Each provider that could run a bundle, and why it is not on this machine ("" where it is).

    A bundle for TensorRT runs its plan on "cuda", and its ONNX form on the others.

    Raises:
        BundleError: the directory is no bundle, or damaged.
        UsageError: nothing here can run it, since its runtime is not installed.
    """
    names = provider_names(directory)
    backend = read_backend(directory)
    if backend == "torch":
        gpu = torch.cuda.is_available()
        return {name: "" if name == "cpu" or gpu else "PyTorch sees no CUDA GPU on this machine" for name in names}
    found: dict[str, str] = {}
    if backend == "tensorrt":
        needs = needs_of(read_manifest(directory))
        found["cuda"] = lacking(needs, here(needs))
    try:
        there, missing = available(), ""
    except UsageError as err:
        if found.get("cuda") != "":  # nothing would be checked, which must not look like success
            raise
        there, missing = [], str(err)
    for name in names:
        absent = missing or f"ONNX Runtime has no {PROVIDERS[name]} on this machine, or no GPU for it"
        found.setdefault(name, "" if name in there else absent)
    return found
