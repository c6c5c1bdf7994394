"""ATen ops that look at the sign of a zero: ONNX has no sign bit, but 1 / -0.0 is negative.

    signbit(x)          x < 0, or x == 0 and 1 / x < 0
    copysign(a, b)      |a| with the sign of b
    atan2(y, x)         torch's exporter gives -pi for atan2(0, -1), 0 for a NaN, and 0 for two infinities

A NaN counts as positive: which of its bits are set cannot be told in ONNX. PyTorch reads the bit, which a NaN that a
computation made may have set.
"""

from __future__ import annotations

import math

from moeopt.ir import stable_nodes as stable
from moeopt.lower.onnx.opset import OPSET as opset20
from moeopt.lower.onnx.translate_numbers import code, constant, is_float, like, op, through
from moeopt.value_types import OnnxValue

_FLOAT, _DOUBLE, _INT32, _BOOL = 1, 11, 6, 9


def signbit(self: OnnxValue) -> OnnxValue:
    if is_float(self):
        dtype = code(self) if code(self) in (_FLOAT, _DOUBLE) else _FLOAT
        wide = self if dtype == code(self) else opset20.Cast(self, to=dtype)
        return _negative(op, lambda number: constant(number, dtype), wide)
    if code(self) == _BOOL:
        return opset20.Less(opset20.Cast(self, to=_INT32), constant(0, _INT32))
    return opset20.Less(self, constant(0, code(self)))


def copysign(self: OnnxValue, other: OnnxValue) -> OnnxValue:
    self, other = (v if not hasattr(v, "dtype") or is_float(v) else opset20.Cast(v, to=_FLOAT) for v in (self, other))
    other = like(float(other), self) if isinstance(other, int | float) else other

    def form(op: stable.Op, const: stable.Const, a: OnnxValue, b: OnnxValue) -> OnnxValue:
        return op("Mul", op("Abs", a), _sign(op, const, b))

    return through(form, self, other)


def atan2(self: OnnxValue, other: OnnxValue) -> OnnxValue:
    def form(op: stable.Op, const: stable.Const, y: OnnxValue, x: OnnxValue) -> OnnxValue:
        up, along = op("Abs", y), op("Abs", x)
        equal = op("Where", op("Equal", up, const(0.0)), const(0.0), const(1.0))  # two zeros, two infinities
        angle = op("Atan", op("Where", op("Equal", up, along), equal, op("Div", up, along)))
        angle = op("Where", _negative(op, const, x), op("Sub", const(math.pi), angle), angle)
        return op("Mul", angle, _sign(op, const, y))

    return through(form, self, other)


def _sign(op: stable.Op, const: stable.Const, x: OnnxValue) -> OnnxValue:
    """-1 or 1. It is multiplied with: ONNX Runtime's Where gives 0 for a -0.0 that it chooses."""
    return op("Where", _negative(op, const, x), const(-1.0), const(1.0))


def _negative(op: stable.Op, const: stable.Const, x: OnnxValue) -> OnnxValue:
    """Whether a float is below 0, or the negative one of the two zeros."""
    zero = const(0.0)
    lesser = op("And", op("Equal", x, zero), op("Less", op("Reciprocal", x), zero))
    return op("Or", op("Less", x, zero), lesser)
