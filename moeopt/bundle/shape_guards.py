"""What a trace took for granted about the sizes of a call, as JSON that is checked at every call.

``torch.export`` follows one call. Where the model asked ``if x.shape[1] > 1`` or made a size an int, the graph is
right only for calls that answer alike. Export knows these questions as Python text; here they become a tree of
lists (``["==", ["max", 2, ["size", 0, 1]], 3]``: leaf 0, dimension 1), so that a bundle holds no code.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from moeopt.errors import BundleError, NotSaveableError, UsageError
from moeopt.value_types import FxArg, JsonValue, PyObject

_BINARY: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.And: "and", ast.Or: "or",
}  # fmt: skip
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "==", "!=": "!="}
_CALLS = {
    "max": "max", "min": "min", "math.floor": "floor", "math.ceil": "ceil", "math.trunc": "trunc", "math.sqrt": "sqrt",
    "torch.sym_float": "float", "torch.sym_int": "trunc", "torch.sym_max": "max", "torch.sym_min": "min",
    "float": "float", "int": "trunc", "round": "round", "abs": "abs", "torch.sym_not": "not",
}  # fmt: skip
_MEANING: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge, "and": lambda *a: all(a), "or": lambda *a: any(a), "not": operator.not_,
    "max": max, "min": min, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "sqrt": math.sqrt,
    "float": float, "round": round, "abs": abs, "neg": operator.neg,
}  # fmt: skip
_ARITY = {
    **dict.fromkeys(("not", "floor", "ceil", "trunc", "sqrt", "float", "abs", "neg"), (1, 1)),
    **dict.fromkeys(("and", "or"), (1, 1 << 16)),
    **dict.fromkeys(("max", "min"), (2, 1 << 16)),
    "round": (1, 2),
}
"""The least and the most operands; two where none are given."""
MAX_POWER, MAX_DEPTH, MAX_NODES = 8, 64, 1 << 16
"""Powers are written as products of at most eight factors: a power of sizes could be an integer of any length."""


def encode_conditions(guards: Sequence[str], leaves: PyObject) -> list[Any]:
    """The conditions among ``guards`` that speak of sizes.

    Args:
        guards: Python expressions over ``L[name]``, as ``ExportedProgram`` holds them.
        leaves: the arguments by name, each leaf replaced by its number.

    Raises:
        NotSaveableError: a condition in a form that is not known here.
    """
    found: list[Any] = []
    for text in guards:
        try:
            condition = _encode(ast.parse(text, mode="eval").body, leaves)
        except (_Other, SyntaxError, KeyError, TypeError, AttributeError, IndexError, ValueError):
            raise NotSaveableError(
                f"the trace holds only where {text.strip()!r}, which cannot be checked at a call: make the model ask "
                "for sizes of its tensors only, or use backend='torch'"
            ) from None
        if condition is not None and _sizes(condition) and condition not in found:
            found.append(condition)
    return found


def only_asked(conditions: Sequence[Any], asked: Sequence[Any]) -> list[Any]:
    """``conditions`` without those by which torch only told sizes from 0, 1 or each other for strides and broadcasts.

    Ops of a graph do both at run time. ``asked`` are the conditions that the model's own code raised.
    """
    meant = [upright(condition) for condition in asked]
    return [c for c in conditions if not _special(upright(c)) or upright(c) in meant]


def _special(condition: JsonValue) -> bool:
    name, *rest = condition
    if _has_remainder(condition):  # as tensor_split asks how its parts come out
        return False
    if name in ("<", ">", "<=", ">=") and all(_sizes(side) for side in rest):  # strides put in order
        return True
    return name == "!=" or (name == ">" and rest[1] in (0, 1)) or (name == ">=" and rest[1] in (1, 2))


def _has_remainder(node: FxArg) -> bool:
    """Whether ``node`` holds the remainder of sizes by a number; remainders by other sizes are questions of strides."""
    if not isinstance(node, list):
        return False
    return (node[0] == "%" and isinstance(node[2], int)) or any(_has_remainder(child) for child in node[1:])


def upright(condition: JsonValue) -> PyObject:
    """The sizes on the left, and no factor where the rest is whole: ``a > 1`` for ``4 < 4 * a`` and ``5 < 4 * a``."""
    name, *rest = condition
    if name not in _TURNED or len(rest) != 2:
        return condition
    if not _sizes(rest[0]):
        name, rest = _TURNED[name], rest[::-1]
    factor, product = _factor(rest[0])
    if factor > 1 and isinstance(rest[1], int):
        if rest[1] % factor == 0 or (name in (">", "<=") and _whole(product)):
            rest = [product, rest[1] // factor]
        elif name in (">=", "<") and _whole(product):
            rest = [product, -(-rest[1] // factor)]
    return [name, *rest]


def _whole(node: FxArg) -> bool:
    """Whether sizes make this a whole number."""
    if not isinstance(node, list):
        return isinstance(node, int)
    return node[0] == "size" or (node[0] in ("+", "-", "*") and all(_whole(child) for child in node[1:]))


def _factor(node: FxArg) -> tuple[int, Any]:
    """The first whole number of a product, and the rest of it."""
    if not isinstance(node, list) or node[0] != "*":
        return 1, node
    for number, other in ((node[1], node[2]), (node[2], node[1])):
        if isinstance(number, int):
            return number, other
    left, rest = _factor(node[1])
    return left, ["*", rest, node[2]]


def check_conditions(
    conditions: Sequence[Any],
    shapes: Callable[[int], Sequence[int]],
    name: Callable[[int], str],
    way_out: str = "as in the call it was exported with: optimise again with example inputs of these sizes (two rows "
    "where it had one), or call what optimize returns with backend='torch', which needs no export",
) -> None:
    """``UsageError`` names the condition that is not met, and the way out; ``shapes(leaf)`` is a leaf's shape."""
    for condition in conditions:
        if not holds([condition], shapes):
            raise UsageError(f"this engine holds for calls where {text_of(condition, name)}, {way_out}")


def holds(conditions: Sequence[Any], shapes: Callable[[int], Sequence[int]]) -> bool:
    """Whether sizes meet all ``conditions``."""
    try:
        return all(value_of(condition, shapes) for condition in conditions)
    except (ArithmeticError, ValueError):
        return False


def read_conditions(conditions: JsonValue, rank: Callable[[int], int] | None = None) -> list[Any]:
    """Conditions from a file; ``BundleError`` for what :func:`encode_conditions` would not have written.

    ``rank(leaf)`` is how many dimensions a leaf has, 0 for one that is no tensor; None where that is not known.
    """
    left = MAX_NODES

    def read(node: FxArg, depth: int = 0) -> PyObject:
        nonlocal left
        left -= 1
        if isinstance(node, (int, float)) and abs(node) <= 1 << 64:
            return node
        if not isinstance(node, list) or not node or depth > MAX_DEPTH or left < 0 or not isinstance(node[0], str):
            raise ValueError
        name, *parts = node
        if name == "size":
            good = len(parts) == 2 and all(type(n) is int and 0 <= n < 1 << 32 for n in parts)
            if not good or (rank is not None and parts[1] >= rank(parts[0])):
                raise ValueError
            return node
        if name == "**":  # older bundles hold it
            return _power(*(read(child, depth + 1) for child in parts))
        min_arity, max_arity = _ARITY.get(name, (2, 2))
        if name not in _MEANING or not min_arity <= len(parts) <= max_arity:
            raise ValueError
        return [name, *(read(child, depth + 1) for child in parts)]

    try:
        return [read(condition) for condition in _listed(conditions)]
    except (ValueError, TypeError):
        raise BundleError(f"{str(conditions)[:80]!r} are not conditions that moeopt writes") from None


def _listed(conditions: JsonValue) -> list[Any]:
    if not isinstance(conditions, list):
        raise ValueError
    return conditions


def _power(base: PyObject, exponent: PyObject) -> PyObject:
    """A power of a size or a number as a product; ``ValueError`` for one that is no small whole number."""
    leaf = not isinstance(base, list) or base[0] == "size"
    if type(exponent) is not int or not 1 <= exponent <= MAX_POWER or not leaf:
        raise ValueError
    product = base
    for _ in range(exponent - 1):
        product = ["*", product, base]
    return product


class _Other(Exception):
    pass


def _encode(node: ast.expr, leaves: PyObject) -> PyObject:
    """A tree of lists, or None for a question that is not about sizes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_encode(node.left, leaves), _encode(node.right, leaves))
    if isinstance(node, ast.BinOp):
        return [_BINARY[type(node.op)], _encode(node.left, leaves), _encode(node.right, leaves)]
    if isinstance(node, ast.UnaryOp):
        name = {ast.USub: "neg", ast.Not: "not"}[type(node.op)]
        return [name, _encode(node.operand, leaves)]
    if isinstance(node, ast.BoolOp):
        return [_BINARY[type(node.op)], *(_encode(v, leaves) for v in node.values)]
    if isinstance(node, ast.Compare):
        return _encode_compare(node, leaves)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call):
        inner = node.value.func
        if isinstance(inner, ast.Attribute) and inner.attr == "size" and isinstance(node.slice, ast.Constant):
            return ["size", _leaf(inner.value, leaves), node.slice.value]
    if isinstance(node, ast.Call) and (known := _CALLS.get(ast.unparse(node.func))):
        return [known, *(_encode(a, leaves) for a in node.args)]
    raise _Other


def _encode_compare(node: ast.Compare, leaves: PyObject) -> PyObject:
    values = [node.left, *node.comparators]
    try:
        parts = [_encode(v, leaves) for v in values]
    except _Other:
        for value in values:  # the value of an argument that is no tensor is checked as a constant of the call
            if isinstance(value, ast.Subscript):
                _leaf(value, leaves)
                return None
        raise
    pairs = [[_BINARY[type(op)], parts[i], parts[i + 1]] for i, op in enumerate(node.ops)]
    return pairs[0] if len(pairs) == 1 else ["and", *pairs]


def _leaf(node: ast.expr, leaves: PyObject) -> PyObject:
    """The number of the leaf, or the container of such numbers, that ``L['x'][0]`` names."""
    if isinstance(node, ast.Name) and node.id == "L":
        return leaves
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return _leaf(node.value, leaves)[node.slice.value]
    if isinstance(node, ast.Attribute):
        return getattr(_leaf(node.value, leaves), node.attr)
    raise _Other


def _sizes(node: FxArg) -> bool:
    return isinstance(node, list) and (node[0] == "size" or any(_sizes(child) for child in node[1:]))


def value_of(node: FxArg, shapes: Callable[[int], Sequence[int]]) -> PyObject:
    """A number or a truth: what an expression over sizes is for a call whose leaf ``n`` has ``shapes(n)``."""
    if not isinstance(node, list):
        return node
    if node[0] == "size":
        return shapes(node[1])[node[2]]
    return _MEANING[node[0]](*[value_of(child, shapes) for child in node[1:]])


def text_of(node: FxArg, name: Callable[[int], str]) -> str:
    """A condition in words; ``name(leaf)`` is what a leaf is called."""
    if not isinstance(node, list):
        return f"{node:g}" if isinstance(node, float) else str(node)
    if node[0] == "size":
        return f"{name(node[1])}.shape[{node[2]}]"
    parts = [text_of(child, name) for child in node[1:]]
    if node[0] == "and" and len(node) == 3 and [c[0] for c in node[1:] if isinstance(c, list)] == [">=", "<="]:
        (_, what, low), (_, same, high) = node[1:]  # an interval, as its owner would say it
        if what == same and not isinstance(low, list) and not isinstance(high, list):
            return f"{text_of(what, name)} is {low} to {high}"
    if node[0] in _BINARY.values():
        inner = [
            f"({p})" if isinstance(c, list) and c[0] in _BINARY.values() else p
            for p, c in zip(parts, node[1:], strict=True)
        ]
        return f" {node[0]} ".join(inner)
    return f"{node[0]}({', '.join(parts)})"
