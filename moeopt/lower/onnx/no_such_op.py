"""Calls of a traced model that ONNX has no op for, in words: what such a call does, and the way out."""

from __future__ import annotations

import torch
from torch import fx

from moeopt.capture.foreign_ops import of_another_library

aten = torch.ops.aten


def without_form(node: fx.Node, where: str) -> str:
    """What ``node``, at ``where`` in the model's code, does that no ONNX graph says; "" where it is not known."""
    if node.target is aten.view.dtype:
        dtype = node.args[1]
        return (
            f"{where} reads the bits of a tensor as {dtype}, for which ONNX has no op. Where the tensor is a weight or "
            f"a buffer, hold it as {dtype} (module.codes = module.codes.view({dtype})) and optimise again, or use "
            "backend='torch'"
        )
    if of_another_library(node.target):
        library = str(node.target).partition(".")[0]
        return (
            f"{where} calls {node.target}, an op of {library}, and ONNX holds none of another library: use "
            "backend='torch', or load the model without it; where it makes weights floats, moeopt.optimize(model, "
            "inputs, quantize='int8') keeps experts as small"
        )
    return ""
