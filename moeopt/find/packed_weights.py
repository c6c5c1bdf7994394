"""Weights that PyTorch's own quantisation packed into objects of C++, in which no mixture of experts can be seen."""

from __future__ import annotations

import torch
from torch import nn

from moeopt.listed import listed


def packed_weights(model: nn.Module) -> str:
    """A sentence on the modules whose weights are such objects, with the way out; "" where there are none."""
    paths = (name for name, module in model.named_modules() if _is_packed(module))
    names = [path.removesuffix("_packed_params").rstrip(".") or type(model).__name__ for path in paths]
    if not names:
        return ""
    some = f"{len(names)} modules hold their weights" if len(names) > 1 else "1 module holds its weights"
    return (
        f"{some} as packed objects of torch.ao.quantization ({listed(names)}), neither Parameters nor buffers: blocks "
        "that compute with them are not seen, and no engine holds them. Give the float model, and let moeopt quantise "
        "its experts: moeopt.optimize(float_model, inputs, quantize='int8')"
    )


def _is_packed(module: nn.Module) -> bool:
    held = (value for value in vars(module).values() if isinstance(value, torch.ScriptObject))
    return any(str(value._type()).endswith("ParamsBase") for value in held)  # of Linear, Conv and cells of RNNs
