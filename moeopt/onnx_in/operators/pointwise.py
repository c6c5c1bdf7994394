"""Element by element: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.values import SizeValue, tensor
from moeopt.value_types import PyObject

_WIDE = (torch.float32, torch.float64)


def _plain(function: Callable[..., Tensor]) -> Callable[[NodeCall], Tensor]:
    """An operator whose inputs are those of a torch function."""

    def run(call: NodeCall) -> Tensor:
        return function(*(call.tensor(n) for n in range(len(call))))

    return run


def _arithmetic(function: Callable[..., Tensor]) -> Callable[[NodeCall], Tensor]:
    """An operator of two inputs, of which one may be a number."""

    def run(call: NodeCall) -> Tensor:
        a, b = call.operand(0), call.operand(1)
        return function(a, b) if isinstance(a, Tensor) or isinstance(b, Tensor) else function(tensor(call.inputs[0]), b)

    return run


def _folded(function: Callable[..., Tensor]) -> Callable[[NodeCall], Tensor]:
    """An operator of any number of inputs, two at a time."""

    def run(call: NodeCall) -> Tensor:
        return functools.reduce(function, [call.tensor(n) for n in range(len(call))])

    return run


def _div(call: NodeCall) -> Tensor:
    a, b = call.operand(0), call.operand(1)
    return a / b if call.tensor(0).is_floating_point() else torch.div(call.tensor(0), b, rounding_mode="trunc")


def _mod(call: NodeCall) -> Tensor:
    form = torch.fmod if call.attribute("fmod", 0) else torch.remainder
    return form(call.tensor(0), call.tensor(1))


def _pow(call: NodeCall) -> Tensor:
    power = call.inputs[1]
    alone = power.number if isinstance(power, SizeValue) and power.array.ndim == 0 else None
    if alone == 0.5:  # torch takes the root, which minus infinity does not have
        alone = None
    raised = torch.pow(call.tensor(0), tensor(power) if alone is None else alone)
    return raised.to(call.tensor(0).dtype)


def _sign(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    return torch.where(x == x, x.sign(), x) if x.dtype in _WIDE else x.sign()


def _cast(call: NodeCall) -> Tensor:
    from moeopt.onnx_in.dtypes import torch_dtype

    return call.tensor(0).to(torch_dtype(call.attribute("to"), call.node))


def _cast_like(call: NodeCall) -> Tensor:
    return call.tensor(0).to(call.tensor(1).dtype)


def _clip(call: NodeCall) -> Tensor:
    """A bound that is left out is the largest finite number, and one that is NaN is none.

    The attribute ``unbounded``, of steps and not of ONNX, takes what is left out for no bound.
    """
    x, low, high = call.tensor(0), _bound(call, 1), _bound(call, 2)
    if x.is_floating_point() and not call.attribute("unbounded", 0):
        low = torch.finfo(x.dtype).min if low is None else low
        high = torch.finfo(x.dtype).max if high is None else high
    low, high = _not_nan(low, -torch.inf), _not_nan(high, torch.inf)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return x if low is None and high is None else x.clamp(low, high)
    x = x if low is None else torch.maximum(x, x.new_full((), low) if not isinstance(low, Tensor) else low)
    return x if high is None else torch.minimum(x, x.new_full((), high) if not isinstance(high, Tensor) else high)


def _not_nan(bound: PyObject, instead: float) -> PyObject:
    if isinstance(bound, Tensor):
        return torch.where(bound == bound, bound, instead) if bound.is_floating_point() else bound
    return instead if bound is not None and bound != bound else bound


def _bound(call: NodeCall, number: int) -> PyObject:
    """A bound of ``Clip``: a number where it is constant, None where there is none."""
    value = call.get(number)
    alone = value.number if isinstance(value, SizeValue) else None
    return value if alone is None and value is None else tensor(value) if alone is None else alone


def _extreme(function: Callable[..., Tensor], clamp: str) -> Callable[[NodeCall], Tensor]:
    """``Min`` or ``Max`` of two, of which one may be a number: a clamp."""

    def run(call: NodeCall) -> Tensor:
        if len(call) == 2:
            for one, other in ((0, 1), (1, 0)):
                number = call.operand(one)
                if not isinstance(number, Tensor) and isinstance(call.inputs[other], Tensor):
                    return torch.clamp(call.tensor(other), **{clamp: number})
        return _folded(function)(call)

    return run


def _erf_gelu(x: Tensor) -> Tensor:
    """Written out: torch's own kernel gives NaN for infinity, and infinity for large numbers."""
    if x.dtype not in _WIDE:
        return F.gelu(x)
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu(call: NodeCall) -> Tensor:
    how = call.attribute("approximate", "none")
    return _erf_gelu(call.tensor(0)) if how == "none" else F.gelu(call.tensor(0), approximate=how)


def _hard_swish(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    return x * (x * (1 / 6) + 0.5).clamp(0, 1)


def _quick_gelu(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    return x * torch.sigmoid(x * call.attribute("alpha", 1.702))


def _hard_sigmoid(call: NodeCall) -> Tensor:
    x: Tensor = call.tensor(0) * call.attribute("alpha", 0.2) + call.attribute("beta", 0.5)
    return x.clamp(0, 1)


def _selu(call: NodeCall) -> Tensor:
    alpha, gamma = (
        call.attribute("alpha", 1.67326319217681884765625),
        call.attribute("gamma", 1.05070102214813232421875),
    )
    raised: Tensor = F.elu(call.tensor(0), alpha=alpha) * gamma
    return raised


def _prelu(call: NodeCall) -> Tensor:
    x, slope = call.tensor(0), call.tensor(1)
    return torch.where(x < 0, x * slope, x)


def _isinf(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    up, down = call.attribute("detect_positive", 1), call.attribute("detect_negative", 1)
    return ((x == torch.inf) & bool(up)) | ((x == -torch.inf) & bool(down))


def _with_bias(form: Callable[[Tensor], Tensor]) -> Callable[[NodeCall], Tensor]:
    def run(call: NodeCall) -> Tensor:
        bias = call.optional(1)
        return form(call.tensor(0) if bias is None else call.tensor(0) + bias)

    return run


def _swish(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    return x * torch.sigmoid(x * call.attribute("alpha", 1.0))


def _attribute_of(function: Callable[..., Tensor], **named: tuple[str, float]) -> Callable[[NodeCall], Tensor]:
    """A function of one tensor with attributes: torch's name of each, ONNX's name and its default."""

    def run(call: NodeCall) -> Tensor:
        return function(call.tensor(0), **{ours: call.attribute(*theirs) for ours, theirs in named.items()})

    return run


POINTWISE: dict[str, Callable[[NodeCall], Tensor]] = {
    **{name: _plain(getattr(torch, low)) for name, low in {
        "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor",
        "Not": "logical_not", "Where": "where", "Neg": "neg", "Abs": "abs", "Sqrt": "sqrt", "Exp": "exp", "Log": "log",
        "Erf": "erf", "Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "relu", "Reciprocal": "reciprocal",
        "Floor": "floor", "Ceil": "ceil", "Round": "round", "Sin": "sin", "Cos": "cos", "Tan": "tan",
        "IsNaN": "isnan", "BitwiseAnd": "bitwise_and", "BitwiseOr": "bitwise_or", "BitwiseNot": "bitwise_not",
        "BitwiseXor": "bitwise_xor",
    }.items()},
    **{name: _arithmetic(getattr(operator, low)) for name, low in {
        "Add": "add", "Sub": "sub", "Mul": "mul", "Equal": "eq", "Greater": "gt", "GreaterOrEqual": "ge", "Less": "lt",
        "LessOrEqual": "le",
    }.items()},
    "Softplus": _plain(F.softplus), "Softsign": _plain(F.softsign), "Mish": _plain(F.mish),
    "HardSwish": _hard_swish, "Sign": _sign,
    "Sum": _folded(torch.add), "Min": _extreme(torch.minimum, "max"),
    "Max": _extreme(torch.maximum, "min"),
    "Div": _div, "Mod": _mod, "Pow": _pow, "Cast": _cast, "CastLike": _cast_like, "Clip": _clip, "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid, "PRelu": _prelu, "IsInf": _isinf, "Swish": _swish,
    "LeakyRelu": _attribute_of(F.leaky_relu, negative_slope=("alpha", 0.01)),
    "Elu": _attribute_of(F.elu, alpha=("alpha", 1.0)),
    "Celu": _attribute_of(F.celu, alpha=("alpha", 1.0)),
    "Selu": _selu,
}  # fmt: skip
"""Of ONNX's own domain."""

CONTRIB_POINTWISE: dict[str, Callable[[NodeCall], Tensor]] = {
    "Gelu": _plain(_erf_gelu),
    "QuickGelu": _quick_gelu,
    "BiasGelu": _with_bias(_erf_gelu),
    "FastGelu": _with_bias(functools.partial(F.gelu, approximate="tanh")),
}
"""Of ``com.microsoft``."""
