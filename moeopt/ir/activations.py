"""The activations that an expert may have: one entry says what PyTorch computes and which ONNX nodes compute the same.

A new activation is one entry of ``ACTIVATION_TABLE`` and its tests: the spec accepts the name, the recogniser and the
transformers adapter try the function, the reference and the torch kernels run it, and each ONNX lowering emits it.
The C++ and Triton kernels have lists of their own (``NATIVE_ACTIVATIONS``, ``TRITON_ACTIVATIONS``) and leave the
other activations to the torch kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir import stable_nodes as stable
from moeopt.ir.stable_nodes import Const, Op
from moeopt.value_types import OnnxValue


@dataclass(frozen=True)
class Activation:
    """One elementwise function, in PyTorch and as ONNX nodes.

    Args:
        name: as ``ExpertsSpec.activation`` spells it; bundles store it.
        torch: ``(g)``, or ``(g, alpha)`` where the function has a parameter: a tensor of the shape and dtype of ``g``,
            never in place.
        onnx: ``(op, const, g)``, or ``(op, const, g, alpha)``: nodes written with ``op(op_type, *values)`` and
            constants of the dtype of ``g`` written with ``const(number)``; see :mod:`moeopt.ir.stable_nodes`.
        alpha: None where the function has no parameter; else the values that the recogniser tries besides the
            numbers that stand in the model's own code.
        one_kernel: PyTorch computes float16 and bfloat16 in float32 inside and rounds once, so the nodes do too.
        onnx_float64: whether ONNX Runtime has float64 kernels for the nodes.
    """

    name: str
    torch: Callable[..., Tensor]
    onnx: Callable[..., OnnxValue]
    alpha: tuple[float, ...] | None = None
    one_kernel: bool = False
    onnx_float64: bool = True

    def parameters(self, alpha: float | None) -> tuple[float, ...]:
        """The arguments after ``g``: none, or ``alpha``; a ``UsageError`` where the function needs one."""
        if self.alpha is None:
            return ()
        if alpha is None:
            raise UsageError(f"activation {self.name!r} needs alpha: name its parameter beside it")
        return (alpha,)


def _relu2(g: Tensor) -> Tensor:
    return torch.square(F.relu(g))


def _identity(g: Tensor) -> Tensor:
    return g


def _gelu_tanh(g: Tensor) -> Tensor:
    return F.gelu(g, approximate="tanh")


def _swish(g: Tensor, alpha: float) -> Tensor:
    return g * torch.sigmoid(g * alpha)


def _softcap(g: Tensor, alpha: float) -> Tensor:
    return alpha * torch.tanh(g / alpha)


def _silu_nodes(op: Op, const: Const, g: OnnxValue) -> OnnxValue:
    return op("Div", g, stable.one_plus_exp_of_minus(op, const, g))


def _swish_nodes(op: Op, const: Const, g: OnnxValue, alpha: float) -> OnnxValue:
    return op("Div", g, stable.one_plus_exp_of_minus(op, const, op("Mul", g, const(alpha))))


def _gelu_nodes(op: Op, const: Const, g: OnnxValue) -> OnnxValue:
    one_plus = op("Add", op("Erf", op("Div", g, const(math.sqrt(2)))), const(1))
    return op("Mul", op("Mul", g, one_plus), const(0.5))


def _gelu_tanh_nodes(op: Op, const: Const, g: OnnxValue) -> OnnxValue:
    cube = op("Mul", op("Mul", op("Mul", g, g), g), const(0.044715))
    inner = op("Mul", op("Add", g, cube), const(math.sqrt(2 / math.pi)))
    return op("Mul", op("Mul", g, const(0.5)), op("Add", op("Tanh", inner), const(1)))


def _relu2_nodes(op: Op, const: Const, g: OnnxValue) -> OnnxValue:
    r = op("Relu", g)
    return op("Mul", r, r)


def _softcap_nodes(op: Op, const: Const, g: OnnxValue, alpha: float) -> OnnxValue:
    return op("Mul", op("Tanh", op("Div", g, const(alpha))), const(alpha))


def _softplus_nodes(op: Op, const: Const, g: OnnxValue) -> OnnxValue:
    linear = op("Greater", g, const(20))  # F.softplus's threshold
    return op("Where", linear, g, stable.softplus(op, const, g))


def _leaky_relu_nodes(op: Op, const: Const, g: OnnxValue, alpha: float) -> OnnxValue:
    return op("Where", op("Greater", g, const(0)), g, op("Mul", g, const(alpha)))


def _node(op_type: str) -> Callable[..., OnnxValue]:
    return lambda op, const, g: op(op_type, g)


ACTIVATION_TABLE: dict[str, Activation] = {
    entry.name: entry
    for entry in (
        Activation("silu", F.silu, _silu_nodes, one_kernel=True),
        Activation("gelu", F.gelu, _gelu_nodes, one_kernel=True, onnx_float64=False),  # Erf has a float32 kernel only
        Activation("gelu_tanh", _gelu_tanh, _gelu_tanh_nodes, one_kernel=True),
        Activation("relu", F.relu, _node("Relu")),
        Activation("relu2", _relu2, _relu2_nodes),  # relu(x)^2
        Activation("sigmoid", torch.sigmoid, stable.sigmoid),
        Activation("tanh", torch.tanh, _node("Tanh")),
        Activation("swish", _swish, _swish_nodes, alpha=(1.702,)),  # x sigmoid(alpha x)
        Activation("softcap", _softcap, _softcap_nodes, alpha=()),  # alpha tanh(x / alpha)
        Activation("identity", _identity, lambda op, const, g: g),
        Activation("leaky_relu", F.leaky_relu, _leaky_relu_nodes, alpha=(0.01,), one_kernel=True),  # slope below zero
        Activation("elu", F.elu, stable.elu, alpha=(1.0,), one_kernel=True),  # scale below zero
        Activation("mish", F.mish, stable.mish, one_kernel=True),
        Activation("softplus", F.softplus, _softplus_nodes, one_kernel=True),
    )
}
"""Every activation by name; the recogniser takes the first that fits, so the order is part of what it answers."""


def activation_of(name: str) -> Activation:
    """The entry called ``name``; a ``UsageError`` that lists the names where there is none."""
    if name not in ACTIVATION_TABLE:
        raise UsageError(f"no activation is called {name!r:.60}; the activations are {', '.join(ACTIVATION_TABLE)}")
    return ACTIVATION_TABLE[name]
