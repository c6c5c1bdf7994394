"""Which tensors hold their own numbers, where the ops read them; and what the others are, in words."""

from __future__ import annotations

import torch
from torch import nn

PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
"""Classes of the tensors that the ops read."""


def unread(tensor: torch.Tensor) -> str:
    """What a tensor is that no probe reads, with the way out; "" for any other."""
    if tensor.device.type == "meta":
        return "on the meta device and has no values; load the weights first"
    if type(tensor) not in PLAIN:
        return (
            f"a {type(tensor).__name__}, which the op cannot read; convert it to a plain tensor (for example "
            f"dequantize() or full_tensor()) and optimise again{_maker(tensor)}"
        )
    if tensor.is_quantized:
        return (
            f"a tensor of {tensor.dtype}, one of PyTorch's own quantised tensors, which neither the op nor an engine "
            "reads; give the float model, or make floats of it (dequantize()), and optimise again: quantize='int8' "
            "keeps experts as small"
        )
    if tensor.layout is not torch.strided and isinstance(tensor, nn.Parameter):
        return (
            f"a Parameter of {tensor.layout}, whose numbers neither the op nor an engine reads; give the dense one "
            "(to_dense()), and optimise again"
        )
    return ""


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds its own numbers: no quantiser's class, nor PyTorch's quantised dtypes."""
    return type(tensor) in PLAIN and not tensor.is_quantized


def package_of(tensor: torch.Tensor) -> str:
    """The package that brings a tensor's class; "" for torch itself and a script's own."""
    return package_named(type(tensor).__module__)


def package_named(module: str | None) -> str:
    """The package of a module's name; "" for torch itself and a script's own."""
    package = (module or "").partition(".")[0]
    return "" if package in ("torch", "__main__") else package


def _maker(tensor: torch.Tensor) -> str:
    package = package_of(tensor)
    return f"; its class is one of {package}, and quantize='int8' keeps experts as small" if package else ""
