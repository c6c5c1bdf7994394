"""ATen ops of arithmetic whose usual ONNX form loses digits, is wrong past some size, or mistakes NaN or infinity.

    log1p, expm1, log_sigmoid     written as log(1 + u), exp(x) - 1 and log(sigmoid(x)) by torch's exporter
    logaddexp                     log(exp(a) + exp(b)) overflows from 89 on
    div(rounding_mode=)           integers go through float32, wrong from 2^24 on
    remainder, floor division     of floats: a - b floor(a / b) has no digits left where a is large
    sum of int64                  ONNX Runtime adds in float64, wrong from 2^53 on: two halves, each exact
    clamp, Python numbers         rounded to float32 beside float64
    relu of integers              ONNX Runtime has it for some of them
    pow(x, 0.5), pow(x, -0.5)     a square root in PyTorch: NaN and not infinity for -infinity
    pow(x, -2)                    1 / (x x) in PyTorch: 0 where x x overflows
    std                           squares of rows beyond 1e19 overflow; the row is scaled first
    erfc, erfcx, log_ndtr         no form keeps their tails: a call names the op and the line that wrote it
    prod of integers              ONNX Runtime multiplies in float64: written out, up to 64 factors
    pow of integers               ONNX Runtime raises in float64, wrong from 2^53 on; PyTorch wraps around, also for
                                  a number to the power of a tensor

16-bit floats are computed in float32, as PyTorch does inside one op. :mod:`moeopt.ir.stable_nodes` has the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeopt.ir import stable_nodes as stable
from moeopt.lower.onnx.opset import OPSET as opset20
from moeopt.value_types import OnnxAttribute, OnnxValue, PyObject

_FLOAT, _DOUBLE, _INT32, _INT64, _BOOL = 1, 11, 6, 7, 9


_HALF = (10, 16)


_COMPLEX = {14: 1, 15: 11}
"""Complex dtypes, as pairs of float32 and float64."""


_HIGH = 2**32


_FACTORS = 64
"""Integers of which a product is written out."""


def op(op_type: str, *values: OnnxValue, **attributes: OnnxAttribute) -> OnnxValue:
    return getattr(opset20, op_type)(*values, **attributes)


def code(x: OnnxValue) -> int:
    return _FLOAT if x.dtype is None else int(x.dtype)


def constant(number: PyObject, dtype: int) -> OnnxValue:
    import onnx_ir as ir

    return opset20.Constant(value=ir.tensor(number, dtype=ir.DataType(dtype)))


def like(value: OnnxValue, x: OnnxValue) -> OnnxValue:
    """``value``, a number or a tensor, in the dtype of ``x``."""
    return constant(value, code(x)) if isinstance(value, int | float) else value


def is_float(x: OnnxValue) -> bool:
    return x.dtype is None or x.dtype.is_floating_point()


def through(form: Callable[..., Any], *values: OnnxValue) -> OnnxValue:
    """``form`` in float32 for 16-bit values."""
    dtype = code(values[0])
    inside = _FLOAT if dtype in _HALF else dtype
    wide = [opset20.Cast(v, to=inside) for v in values] if dtype in _HALF else values
    found = form(op, lambda number: constant(number, inside), *wide)
    return opset20.Cast(found, to=dtype) if dtype in _HALF else found


def of_x(form: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: through(form, self)


def log_sigmoid_forward(self: OnnxValue) -> OnnxValue:
    return through(stable.log_sigmoid, self), opset20.Identity(self)  # the second is for gradients


def logaddexp(self: OnnxValue, other: OnnxValue) -> OnnxValue:
    def form(op: stable.Op, const: stable.Const, a: OnnxValue, b: OnnxValue) -> OnnxValue:
        far = op("Neg", op("Abs", op("Sub", a, b)))
        far = op("Where", op("Equal", a, b), const(0.0), far)  # two infinities
        return op("Add", op("Max", a, b), stable.log1p(op, const, op("Exp", far)))

    return through(form, self, other)


def divided(self: OnnxValue, other: OnnxValue, rounding_mode: str | None = None) -> OnnxValue:
    self, other = like(self, other), like(other, self)
    if rounding_mode is None:
        return opset20.Div(self, other)
    if rounding_mode == "floor":
        return floor_divided(self, other)
    if not is_float(self):
        return opset20.Div(self, other)

    def truncated(op: stable.Op, const: stable.Const, a: OnnxValue, b: OnnxValue) -> OnnxValue:
        whole = op("Floor", op("Abs", op("Div", a, b)))
        return op("Where", op("Less", op("Div", a, b), const(0.0)), op("Neg", whole), whole)

    return through(truncated, self, other)


def floor_divided(self: OnnxValue, other: OnnxValue) -> OnnxValue:
    self, other = like(self, other), like(other, self)
    if is_float(self):
        return through(stable.floor_div, self, other)
    quotient = opset20.Div(self, other)
    if not self.dtype.is_signed():
        return quotient
    zero = constant(0, code(self))
    apart = opset20.Xor(opset20.Less(self, zero), opset20.Less(other, zero))
    rest = opset20.Not(opset20.Equal(opset20.Mod(self, other), zero))
    return opset20.Sub(quotient, opset20.Cast(opset20.And(apart, rest), to=code(self)))


def remainder(self: OnnxValue, other: OnnxValue) -> OnnxValue:
    self, other = like(self, other), like(other, self)
    return through(stable.floor_mod, self, other) if is_float(self) else opset20.Mod(self, other)


def total(self: OnnxValue, dim: PyObject = None, keepdim: bool = False, dtype: int | None = None) -> OnnxValue:
    given = code(self)
    wanted = dtype if dtype not in (None, -1) else _INT64 if not is_float(self) else given
    if not self.shape:
        return opset20.Cast(self, to=wanted)
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    axes = opset20.Constant(value_ints=dims or list(range(len(self.shape))))

    def add(x: OnnxValue) -> OnnxValue:
        return opset20.ReduceSum(x, axes, keepdims=int(keepdim))

    if wanted != _INT64:  # PyTorch converts before it adds
        return add(self if given == wanted else opset20.Cast(self, to=wanted))
    x = self if given == _INT64 else opset20.Cast(self, to=_INT64)
    if given != _INT64 or _is_flags(self):
        return add(x)
    two = constant(_HIGH, _INT64)
    low = opset20.Mod(x, two)
    high = opset20.Div(opset20.Sub(x, low), two)
    return opset20.Add(opset20.Mul(add(high), two), add(low))


def total_of_all(self: OnnxValue, dtype: int | None = None) -> OnnxValue:
    return total(self, dtype=dtype)


def clamp(self: OnnxValue, min: OnnxValue = None, max: OnnxValue = None) -> OnnxValue:
    found = opset20.Identity(self) if min is None and max is None else self
    for name, bound in (("Max", min), ("Min", max)):
        if bound is not None:
            found = op(name, found, like(bound, self))
    return found


def clamp_min(self: OnnxValue, min: OnnxValue) -> OnnxValue:
    return clamp(self, min=min)


def clamp_max(self: OnnxValue, max: OnnxValue) -> OnnxValue:
    return clamp(self, max=max)


def relu(self: OnnxValue) -> OnnxValue:
    return opset20.Relu(self) if is_float(self) else clamp(self, min=0)


def power(self: OnnxValue, exponent: PyObject) -> OnnxValue:
    if is_float(self) and abs(exponent) == 0.5:
        root = opset20.Sqrt(self)
        return root if exponent > 0 else opset20.Reciprocal(root)
    if is_float(self) and exponent == -2:
        return opset20.Reciprocal(opset20.Mul(self, self))
    if is_float(self):
        return opset20.Pow(self, like(exponent, self))
    if not isinstance(exponent, int):
        return power(opset20.Cast(self, to=_FLOAT), float(exponent))
    return whole_power(opset20.Cast(self, to=_INT64) if code(self) == _BOOL else self, exponent)


def whole_power(self: OnnxValue, exponent: int) -> OnnxValue:
    """Integers to a power of 0 or more, by squares: each product wraps around as PyTorch's."""
    if exponent < 2:
        return opset20.Identity(self) if exponent == 1 else opset20.Pow(self, like(exponent, self))
    found = None
    square = self
    for at in range(exponent.bit_length()):
        square = opset20.Mul(square, square) if at else self
        if exponent >> at & 1:
            found = square if found is None else opset20.Mul(found, square)
    return found


def power_tensor(self: OnnxValue, exponent: OnnxValue) -> OnnxValue:
    """Tensors of one dtype. A negative power of an integer is 0 in PyTorch, but for those of 1 and -1."""
    if is_float(self) or is_float(exponent):
        return opset20.Pow(self, exponent)
    return whole_powers(self, exponent, code(self), self.dtype.bitwidth)


def whole_powers(self: OnnxValue, exponent: OnnxValue, dtype: int, bits: int) -> OnnxValue:
    """Integers to powers that are tensors; the result has ``dtype``, of so many bits."""
    wide = _INT64 if dtype == _INT64 else _INT32
    square, rest = (opset20.Cast(v, to=wide) for v in (self, exponent))
    zero, one, two = (constant(n, wide) for n in (0, 1, 2))
    is_unit = opset20.Equal(opset20.Mul(square, square), one)
    is_unit = opset20.And(is_unit, opset20.LessOrEqual(opset20.Abs(square), one))
    rest = opset20.Where(opset20.And(is_unit, opset20.Less(rest, zero)), opset20.Mod(rest, two), rest)
    negative = opset20.Less(rest, zero)
    found = one
    for _ in range(bits):
        odd = opset20.Equal(opset20.Mod(rest, two), one)
        found = opset20.Mul(found, opset20.Where(odd, square, one))
        square, rest = opset20.Mul(square, square), opset20.Div(rest, two)
    return opset20.Cast(opset20.Where(negative, zero, found), to=dtype)


def deviation(
    self: OnnxValue, dim: PyObject = None, *, correction: PyObject = None, keepdim: bool = False
) -> OnnxValue:
    rank = len(self.shape)
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    axes, count = opset20.Constant(value_ints=dims), code(self)

    def form(op: stable.Op, const: stable.Const, x: OnnxValue) -> OnnxValue:
        d = op("Sub", x, op("ReduceMean", x, axes, keepdims=1))
        widest = op("ReduceMax", op("Abs", d), axes, keepdims=1)
        scale = op("Where", op("Equal", widest, const(0.0)), const(1.0), widest)
        part = op("Div", d, scale)
        total = op("ReduceSum", op("Mul", part, part), axes, keepdims=1)
        sizes = op("Gather", op("Shape", x), opset20.Constant(value_ints=[n % rank for n in dims]), axis=0)
        many = op("Cast", op("ReduceProd", sizes, keepdims=0), to=_FLOAT if count in _HALF else count)
        free = op("Max", op("Sub", many, const(1.0 if correction is None else float(correction))), const(0.0))
        root = op("Mul", scale, op("Sqrt", op("Div", total, free)))
        return root if keepdim else op("Squeeze", root, axes)

    return through(form, self)


def power_of(self: OnnxValue, exponent: PyObject) -> OnnxValue:
    if is_float(exponent):
        return opset20.Pow(constant(float(self), code(exponent)), exponent)
    if isinstance(self, int):
        flags = code(exponent) == _BOOL
        dtype, bits = (_INT64, 64) if flags else (code(exponent), exponent.dtype.bitwidth)
        return whole_powers(
            constant(self, _INT64), opset20.Cast(exponent, to=dtype) if flags else exponent, dtype, bits
        )
    return opset20.Pow(constant(self, _FLOAT), opset20.Cast(exponent, to=_FLOAT))


def scalar_tensor(number: PyObject, *, dtype: int | None = None, **options: PyObject) -> OnnxValue:
    wanted = _FLOAT if dtype in (None, -1) else dtype
    if not isinstance(number, int | float | complex):  # a size
        return opset20.Cast(number, to=wanted)
    if wanted in _COMPLEX:
        return constant([complex(number).real, complex(number).imag], _COMPLEX[wanted])
    return constant(number, wanted)


def refuse(name: str, why: str) -> Callable[..., Any]:
    def refused(*args: PyObject, **kwargs: PyObject) -> OnnxValue:
        raise NotImplementedError(f"{name} {why}")

    return refused


def product(self: OnnxValue, dim: int, keepdim: bool = False, dtype: int | None = None) -> OnnxValue:
    wanted = dtype if dtype not in (None, -1) else _INT64 if not is_float(self) else code(self)
    axis = opset20.Constant(value_ints=[dim])
    if wanted in (_FLOAT, _DOUBLE, *_HALF):
        x = self if code(self) == wanted else opset20.Cast(self, to=wanted)
        return opset20.ReduceProd(x, axis, keepdims=int(keepdim))
    x = self if code(self) == _INT64 else opset20.Cast(self, to=_INT64)
    size = self.shape[dim]
    if not isinstance(size, int) or not 0 < size <= _FACTORS:
        many = size if isinstance(size, int) else "an unknown number of"
        raise NotImplementedError(f"a product of {many} integers has no form in ONNX that is exact from 2**53 on")
    whole, *rest = [opset20.Gather(x, constant([n], _INT64), axis=dim) for n in range(size)]
    for part in rest:
        whole = opset20.Mul(whole, part)
    whole = whole if wanted == _INT64 else opset20.Cast(whole, to=wanted)
    return whole if keepdim else opset20.Squeeze(whole, axis)


def _is_flags(x: OnnxValue) -> bool:
    """Whether an integer tensor was cast from booleans: its sums are counts."""
    node = x.producer() if hasattr(x, "producer") else None
    if node is None or node.op_type != "Cast":
        return False
    source = node.inputs[0]
    return source.dtype is not None and int(source.dtype) == _BOOL
