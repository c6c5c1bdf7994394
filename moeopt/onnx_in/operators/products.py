"""Matrix products and 1 x 1 convolutions, of plain weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.errors import Declined
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.pointwise import POINTWISE


def _matmul(call: NodeCall) -> Tensor:
    return call.tensor(0) @ call.tensor(1)


def _gemm(call: NodeCall) -> Tensor:
    a, b, c = call.tensor(0), call.tensor(1), call.optional(2)
    a = a.t() if call.attribute("transA", 0) else a
    b = b.t() if call.attribute("transB", 0) else b
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    y = a @ b
    y = y if alpha == 1 else y * alpha
    if c is None or beta == 0:  # ONNX Runtime does not read C then, whatever it holds
        return y
    return y + (c if beta == 1 else c * beta)


def _einsum(call: NodeCall) -> Tensor:
    return torch.einsum(call.attribute("equation"), *(call.tensor(n) for n in range(len(call))))


def _conv(call: NodeCall) -> Tensor:
    x, w, bias = call.tensor(0), call.tensor(1), call.optional(2)
    pads = call.attribute("pads") or [0] * (2 * (w.dim() - 2))
    half = len(pads) // 2
    ones = [1] * half
    if list(pads[:half]) != list(pads[half:]) or call.attribute("auto_pad", "NOTSET") != "NOTSET":
        raise Declined(f"{call.node} is a convolution with other padding before than behind")
    form = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}.get(w.dim())
    if form is None:
        raise Declined(f"{call.node} is a convolution over {w.dim() - 2} axes")
    strides, dilations = call.attribute("strides") or ones, call.attribute("dilations") or ones
    made: Tensor = form(x, w, bias, list(strides), list(pads[:half]), list(dilations), call.attribute("group", 1))
    return made


def _fused_matmul(call: NodeCall) -> Tensor:
    a, b = call.tensor(0), call.tensor(1)
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise Declined(f"{call.node} turns its batches, which the interpreter does not read")
    a = a.transpose(-1, -2) if call.attribute("transA", 0) else a
    b = b.transpose(-1, -2) if call.attribute("transB", 0) else b
    y = a @ b
    alpha = call.attribute("alpha", 1.0)
    return y if alpha == 1 else y * alpha


def _fused_gemm(call: NodeCall) -> Tensor:
    """A ``Gemm`` and the activation behind it, whose attributes have the activation's name ahead."""
    name, before = call.attribute("activation"), "activation_"
    if name not in POINTWISE:
        raise Declined(f"{call.node} has the activation {name!r}, which the interpreter does not read")
    made = _gemm(call)
    own = {key.removeprefix(before): value for key, value in call.attributes.items() if key.startswith(before)}
    return POINTWISE[name](NodeCall(call.node, [made], own, 1, call.opset))


PRODUCTS: dict[str, Callable[[NodeCall], Tensor]] = {
    "MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Conv": _conv,
}  # fmt: skip
"""Of ONNX's own domain."""

CONTRIB_PRODUCTS: dict[str, Callable[[NodeCall], Tensor]] = {"FusedMatMul": _fused_matmul, "FusedGemm": _fused_gemm}
"""Of ``com.microsoft``."""
