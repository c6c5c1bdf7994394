"""Functions whose kernel, or whose usual graph, loses the digits of small results, written so that the digits stay.

    sigmoid(x)     1 / (1 + exp(-x))                           what PyTorch computes; ONNX Runtime's is 0 below -18
    log1p(u)       u log(w) / (w - 1),  w = 1 + u              the error of w cancels; u where w is 1
    expm1(x)       x (w - 1) / log(w),  w = exp(x)             alike; w - 1 where |x| > 1, x where w is 1, and -1
                                                               where 1 + w is 1, as PyTorch's vector kernel has it
    logsigmoid(x)  min(x, 0) - log1p(exp(-|x|))
    elu(x)         alpha expm1(x / beta) below 0               Elu, Selu and Celu of ONNX Runtime: alpha (exp(x) - 1)
    tanh(x)        1 - 2 / (exp(2|x|) + 1), with x's sign      ONNX Runtime's is 5 units off near 1; from |x| = 1 on
    mish(x)        x n / (n + 2),  n = e (e + 2), e = exp(x)   tanh(log(1 + e)), without the logarithm

Sources: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 1.14.1 (log1p and expm1, after Kahan).
Each function writes nodes with ``op(op_type, *values)`` and constants of x's dtype with ``const(number)``. They are
for float32 and float64; 16-bit values are cast to float32 before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from moeopt.value_types import OnnxAttribute, OnnxValue

Op: TypeAlias = Callable[..., OnnxValue]
Const: TypeAlias = Callable[[float], OnnxValue]
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
_SATURATED = 20.0
"""From here on mish(x) is x to the last digit."""


def one_plus_exp_of_minus(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """The denominator of sigmoid(x): ``a * sigmoid(x)`` is ``a`` over it, which is how PyTorch computes silu."""
    return op("Add", op("Exp", op("Neg", x)), const(1.0))


def sigmoid(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """1 / (1 + exp(-x)); 0 where exp(-x) overflows, as in PyTorch."""
    return op("Reciprocal", one_plus_exp_of_minus(op, const, x))


def log1p(op: Op, const: Const, u: OnnxValue) -> OnnxValue:
    """log(1 + u)."""
    w = op("Add", u, const(1.0))
    d, log = op("Sub", w, const(1.0)), op("Log", w)
    near = op("Where", op("Equal", d, const(0.0)), u, op("Mul", log, op("Div", u, d)))
    return op("Where", op("Equal", d, u), log, near)  # exact sums, and infinity, where u / d is NaN


def expm1(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """exp(x) - 1; -1 from log(eps / 2) down, so that ``expm1(x) + 1`` is 0 where it is in PyTorch."""
    w, one = op("Exp", x), const(1.0)
    d = op("Where", op("Equal", op("Add", w, one), one), const(-1.0), op("Sub", w, one))
    near = op("Where", op("Equal", d, const(0.0)), x, op("Mul", d, op("Div", x, op("Log", w))))
    return op("Where", op("Greater", op("Abs", x), one), d, near)


def log_sigmoid(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """log(sigmoid(x))."""
    tail = log1p(op, const, op("Exp", op("Neg", op("Abs", x))))
    return op("Sub", op("Min", x, const(0.0)), tail)


def softplus(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """log(1 + exp(x))."""
    return op("Add", op("Relu", x), log1p(op, const, op("Exp", op("Neg", op("Abs", x)))))


def elu(op: Op, const: Const, x: OnnxValue, alpha: float = 1.0, scale: float = 1.0, per: float = 1.0) -> OnnxValue:
    """``scale * x`` above 0, ``scale * alpha * expm1(x / per)`` below; selu and celu are among them."""
    low = op("Min", x, const(0.0))  # where x is large and not chosen, exp would overflow
    below = expm1(op, const, low if per == 1 else op("Div", low, const(per)))
    below = below if alpha * scale == 1 else op("Mul", below, const(alpha * scale))
    above = x if scale == 1 else op("Mul", x, const(scale))
    return op("Where", op("Greater", x, const(0.0)), above, below)


def tanh(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """tanh(x), rounded once where it is near 1, so that ``1 - tanh(x)`` is PyTorch's."""
    a = op("Abs", x)
    below = op("Div", const(2.0), op("Add", op("Exp", op("Mul", a, const(2.0))), const(1.0)))
    far = op("Mul", op("Sign", x), op("Sub", const(1.0), below))
    return op("Where", op("Greater", a, const(1.0)), far, op("Tanh", x))


def gelu_tanh(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    cube = op("Mul", op("Mul", op("Mul", x, x), x), const(0.044715))
    inner = op("Mul", op("Add", x, cube), const(math.sqrt(2 / math.pi)))
    return op("Mul", op("Mul", x, const(0.5)), op("Add", const(1.0), tanh(op, const, inner)))


def mish(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """x tanh(softplus(x))."""
    e = op("Exp", op("Min", x, const(_SATURATED)))
    n = op("Mul", e, op("Add", e, const(2.0)))
    return op("Mul", x, op("Div", n, op("Add", n, const(2.0))))


def hardsigmoid(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """relu6(x + 3) / 6, not x / 6 + 1/2: the sum is exact near -3, where the result is 0."""
    return op("Div", op("Clip", op("Add", x, const(3.0)), const(0.0), const(6.0)), const(6.0))


def hardswish(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """x relu6(x + 3) / 6, multiplied before it is divided as PyTorch does."""
    return op("Div", op("Mul", x, op("Clip", op("Add", x, const(3.0)), const(0.0), const(6.0))), const(6.0))


def sign(op: Op, const: Const, x: OnnxValue) -> OnnxValue:
    """-1, 0 or 1; 0 for NaN, as in PyTorch."""
    return op("Where", op("IsNaN", x), const(0.0), op("Sign", x))


def max_pool(op: Op, const: Const, x: OnnxValue, attributes: Mapping[str, OnnxAttribute]) -> OnnxValue:
    """The largest of each window, NaN where one is in it and -inf where all are, as in PyTorch: the kernel passes over
    NaN, and begins with the least number."""
    seen = op("Where", op("Greater", x, const(-math.inf)), const(1.0), const(0.0))
    seen = op("MaxPool", op("Where", op("IsNaN", x), const(2.0), seen), **attributes)
    largest = op("Where", op("Greater", seen, const(0.5)), op("MaxPool", x, **attributes), const(-math.inf))
    return op("Where", op("Greater", seen, const(1.5)), const(math.nan), largest)


def floor_mod(op: Op, const: Const, a: OnnxValue, b: OnnxValue) -> OnnxValue:
    """a - b floor(a / b), of floats: through fmod, which is exact at every magnitude."""
    mod = op("Mod", a, b, fmod=1)
    return op("Where", _crosses(op, const, mod, b), op("Add", mod, b), mod)


def floor_div(op: Op, const: Const, a: OnnxValue, b: OnnxValue) -> OnnxValue:
    """floor(a / b), of floats; NaN for an infinite a, as in Python and PyTorch."""
    mod = op("Mod", a, b, fmod=1)
    quotient = op("Div", op("Sub", a, mod), b)
    quotient = op("Where", _crosses(op, const, mod, b), op("Sub", quotient, const(1.0)), quotient)
    low = op("Floor", quotient)
    low = op("Where", op("Greater", op("Sub", quotient, low), const(0.5)), op("Add", low, const(1.0)), low)
    return op("Where", op("Equal", b, const(0.0)), op("Div", a, b), low)


def _crosses(op: Op, const: Const, mod: OnnxValue, b: OnnxValue) -> OnnxValue:
    """Where a remainder is not 0 and has another sign than ``b``."""
    zero = const(0.0)
    differ = op("Xor", op("Less", b, zero), op("Less", mod, zero))
    return op("And", op("Not", op("Equal", mod, zero)), differ)
