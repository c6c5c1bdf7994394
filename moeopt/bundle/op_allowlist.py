"""Which functions a bundle's graph may name: the ATen ops of a list, moeopt's own three, and arithmetic on numbers.

A graph is data that came from elsewhere, so the question is not what it is likely to say but what it could say. The
list, ``torch_ops.txt``, holds ops that change none of their arguments, take plain values only, and refuse sizes,
strides, dtypes and values that do not fit: an op that believes what it is told reads memory that is not its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moeopt.bundle.checked_ops import CHECKED
from moeopt.errors import BundleError
from moeopt.value_types import FxTarget, PyObject

OWN_OPS = ("moeopt.experts.default", "moeopt.quantized_experts.default", "moeopt.route.default")

SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "operator.getitem": operator.getitem,
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.truediv": operator.truediv,
    "operator.mod": operator.mod,
    "operator.neg": operator.neg,
    "operator.eq": operator.eq,
    "operator.ne": operator.ne,
    "operator.lt": operator.lt,
    "operator.le": operator.le,
    "operator.gt": operator.gt,
    "operator.ge": operator.ge,
    "operator.and_": operator.and_,
    "operator.or_": operator.or_,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_not": torch.sym_not,
    "torch.sym_int": torch.sym_int,
    "torch.sym_float": torch.sym_float,
    "torch.sym_sum": torch.sym_sum,
}
"""``operator.pow`` and the shifts are absent: one small graph could ask for an integer of any length."""

_NAMES = {function: name for name, function in SCALAR_FUNCTIONS.items()}
_WIDEST = 1 << 64
OPS = frozenset((Path(__file__).parent / "torch_ops.txt").read_text(encoding="utf-8").split())
"""The ATen ops that a graph may call. Each was attacked with wrong sizes, strides, dtypes and extremes, and either
checks its bounds itself or has a check before it in ``checked_ops``; the nightly tests attack them all again."""


def name_of(target: FxTarget) -> str:
    """The name under which a graph may call ``target``; ``BundleError`` says why when it may not."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        _check(name, target)
        return name
    if target in _NAMES:
        return _NAMES[target]
    raise BundleError(f"{_describe(target)} is not an ATen op, a moeopt op or integer arithmetic")


def function_named(name: PyObject) -> Callable[..., Any]:
    """The inverse of :func:`name_of`; ``BundleError`` for a name that a graph may not call."""
    if not isinstance(name, str):
        raise BundleError(f"an op is named {name!r}, which is not a string")
    if name in SCALAR_FUNCTIONS:
        return SCALAR_FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in ("aten", "moeopt"):
        raise BundleError(f"the op {name!r} is not one that a bundle may call")
    try:
        target = getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        target = None
    if not isinstance(target, torch._ops.OpOverload) or str(target) != name:
        raise BundleError(f"the op {name!r} does not exist in torch {torch.__version__}: written by another version?")
    _check(name, target)
    return target


def op_named(name: PyObject) -> PyObject:
    """The op under a name that a graph may call; None for arithmetic on numbers."""
    target = function_named(name)
    return target if isinstance(target, torch._ops.OpOverload) else None


def guarded(name: PyObject) -> Callable[..., Any]:
    """What is called where a graph names ``name``: the function itself, or one that checks its arguments first."""
    target = function_named(name)
    if isinstance(target, torch._ops.OpOverload):
        return CHECKED.get(name, target)
    return _Number(name, target)


class _Number:
    """Arithmetic on numbers of at most 64 bits, and taking an item of a list: of tensors and words it is another."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__name__, self._function, self._item = name, function, function is operator.getitem

    def __call__(self, *args: PyObject) -> PyObject:
        if self._item:
            if len(args) != 2 or not isinstance(args[0], (list, tuple)) or type(args[1]) is not int:
                raise BundleError("operator.getitem takes an item of a list by its number")
            return args[0][args[1]]
        several = self._function is torch.sym_sum
        flat = [v for a in args for v in (a if several and isinstance(a, (list, tuple)) else [a])]
        if not all(isinstance(v, (int, float)) for v in flat):
            raise BundleError(f"{self.__name__} takes numbers, not {', '.join(type(v).__name__ for v in flat)}")
        result = self._function(*args)
        if isinstance(result, int) and abs(result) > _WIDEST:
            raise BundleError(f"{self.__name__} gives a number that does not fit 64 bits")
        return result


def _check(name: str, target: torch._ops.OpOverload) -> None:
    if target.namespace == "moeopt" and name in OWN_OPS:
        return
    if name in OPS:
        return
    if target.namespace != "aten":
        why = f"its namespace is {target.namespace}"
    elif target._schema.is_mutable:
        why = "it changes its arguments"
    elif not torch._C._dispatch_has_kernel(target.name()):
        why = "it is not a dispatcher op"
    else:
        why = "its family is not one that can be run on untrusted data"
    raise BundleError(f"the op {name!r} is not one that a bundle may call: {why}")


def _describe(target: FxTarget) -> str:
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"the higher-order op {target.name()!r}"
    module = getattr(target, "__module__", "")
    return f"{module + '.' if module else ''}{getattr(target, '__name__', repr(target))}"
