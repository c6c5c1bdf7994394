"""Conditions without the sizes that other conditions fix: they say the same, and fewer of them are news.

    a == 1,  (16 * b) % (8 * b * a) == 0     ->     a == 1,  b >= 1

A remainder of nothing is no answer, so a condition with one is met by no call whose divisor is 0; that much stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction
from typing import Any, TypeAlias

from moeopt.bundle.shape_guards import upright, value_of
from moeopt.value_types import FxArg, JsonValue, PyObject

_Size: TypeAlias = "tuple[int, int]"
_Sum: TypeAlias = "dict[tuple[_Size, ...], int]"
"""A polynomial: the factor of each product of sizes."""
_ZERO = {"==": True, "<=": True, ">=": True, "!=": False, "<": False, ">": False}
"""What a comparison says of equal sides."""


def settled(conditions: Sequence[Any]) -> list[Any]:
    """``conditions``, each with numbers for the sizes that others of them fix, and without those that are then met."""
    found = list(conditions)
    for _ in conditions:  # a size may fix the next one
        fixed: dict[_Size, int] = {}
        fixing = set[int]()
        for number, condition in enumerate(found):
            if _fixes(condition) and (size := _size(condition[1])) not in fixed:
                fixed[size] = condition[2]
                fixing.add(number)
        again: list[Any] = []
        for number, condition in enumerate(found):
            again += [condition] if number in fixing else _with_numbers(condition, fixed)
        again = [c for number, c in enumerate(again) if c not in again[:number]]
        if again == found:
            break
        found = again
    return found


def at_least_one(condition: JsonValue) -> bool:
    """Whether it only says that a size is not 0."""
    name, what, least = condition[0], condition[1], condition[-1]
    return bool(name == ">=" and isinstance(what, list) and what[0] == "size" and least == 1)


def _fixes(condition: JsonValue) -> bool:
    """Whether it says that a size is a number."""
    return (
        condition[0] == "==" and isinstance(condition[1], list) and condition[1][0] == "size" and _whole(condition[2])
    )


def _whole(node: FxArg) -> bool:
    return isinstance(node, int) and not isinstance(node, bool)


def _size(node: FxArg) -> _Size:
    return node[1], node[2]


def _with_numbers(condition: JsonValue, fixed: Mapping[_Size, int]) -> list[Any]:
    """What ``condition`` still says where sizes are ``fixed``, as a list of conditions."""
    if not any(size in fixed for size in _sizes(condition)):
        return [condition]
    plain = _numbered(condition, fixed)
    divisors = _divisors(plain)
    if divisors is None:
        return [plain]
    left = _folded(plain, divisors)
    if left is False:  # no call meets all conditions; the traced one did
        return [condition]
    needs: list[Any] = [[">=", ["size", *size], 1] for size in sorted(divisors)]
    return needs if left is True else [upright(left), *needs]


def _sizes(node: FxArg) -> set[_Size]:
    if not isinstance(node, list):
        return set()
    return {_size(node)} if node[0] == "size" else set().union(*(_sizes(child) for child in node[1:]))


def _numbered(node: FxArg, fixed: Mapping[_Size, int]) -> PyObject:
    if not isinstance(node, list):
        return node
    if node[0] == "size":
        return fixed.get(_size(node), node)
    return [node[0], *(_numbered(child, fixed) for child in node[1:])]


def _divisors(node: FxArg) -> set[_Size] | None:
    """The sizes of which none may be 0, for ``node`` to have a value; None where there is more to it than that."""
    if not isinstance(node, list) or node[0] == "size":
        return set()
    found = set[_Size]()
    for child in node[1:]:
        of_child = _divisors(child)
        if of_child is None:
            return None
        found |= of_child
    if node[0] not in ("/", "//", "%", "sqrt"):
        return found
    by = _polynomial(_folded(node[2], frozenset())) if node[0] != "sqrt" else None
    return None if not by or len(by) != 1 else found.union(*by)


def _folded(node: FxArg, positive: AbstractSet[_Size]) -> PyObject:
    """``node`` with what is known of it in its place, where the sizes ``positive`` are not 0, and no divisor is."""
    if not isinstance(node, list) or node[0] == "size":
        return node
    name, *parts = node[0], *(_folded(child, positive) for child in node[1:])
    if not any(isinstance(part, list) for part in parts):
        try:
            return value_of([name, *parts], lambda leaf: ())
        except (ArithmeticError, ValueError):
            return [name, *parts]
    if name in ("and", "or"):
        return _joined(name, parts)
    if name in ("//", "%") and (times := _times(*parts)) is not None:
        return times if name == "//" else 0
    if name in _ZERO and (answer := _compared(name, parts[0], parts[1], positive)) is not None:
        return answer
    if name == "*" and 1 in parts:
        return parts[0] if parts[1] == 1 else parts[1]
    if name in ("//", "%") and parts[1] == 1 and _polynomial(parts[0]) is not None:
        return 0 if name == "%" else parts[0]
    return [name, *parts]


def _joined(name: str, parts: list[Any]) -> PyObject:
    """``and`` or ``or`` of parts, some of which are known."""
    decides = name == "or"
    if any(part is decides for part in parts):
        return decides
    left = [part for part in parts if not isinstance(part, bool)]
    return [name, *left] if len(left) > 1 else left[0] if left else not decides


def _compared(name: str, left: FxArg, right: FxArg, positive: AbstractSet[_Size]) -> bool | None:
    """The answer of a comparison, where all sizes give the same."""
    sides = _polynomial(left), _polynomial(right)
    if sides[0] is None or sides[1] is None:
        return None
    apart = _added(sides[0], sides[1], -1)
    if not apart:
        return _ZERO[name]
    signs = {factor > 0 for factor in apart.values()}
    if len(signs) > 1 or not all(positive >= set(product) for product in apart):
        return None
    return name in (("!=", ">", ">=") if True in signs else ("!=", "<", "<="))


def _times(part: FxArg, by: FxArg) -> int | None:
    """How often ``by``, one product of sizes, is in ``part``; None where that is no number."""
    whole, divisor = _polynomial(part), _polynomial(by)
    if not whole or divisor is None or len(divisor) != 1 or () in divisor or set(whole) != set(divisor):
        return None
    ((product, factor),) = divisor.items()
    times = Fraction(whole[product], factor)
    return int(times) if times.denominator == 1 else None


def _polynomial(node: FxArg) -> _Sum | None:
    """A whole number, or a sum of products of sizes; None for anything else."""
    if not isinstance(node, list):
        return ({(): node} if node else {}) if _whole(node) else None
    if node[0] == "size":
        return {(_size(node),): 1}
    parts = [_polynomial(child) for child in node[1:]]
    if node[0] not in ("+", "-", "*", "neg") or any(part is None for part in parts):
        return None
    first, *rest = [part for part in parts if part is not None]
    if node[0] == "neg":
        return _added({}, first, -1)
    if node[0] in ("+", "-"):
        return _added(first, rest[0], 1 if node[0] == "+" else -1)
    product: _Sum = {}
    for one, of_one in first.items():
        for other, of_other in rest[0].items():
            product = _added(product, {tuple(sorted(one + other)): of_one * of_other}, 1)
    return product


def _added(first: _Sum, second: _Sum, times: int) -> _Sum:
    both = {key: first.get(key, 0) + times * second.get(key, 0) for key in first | second}
    return {key: factor for key, factor in both.items() if factor}
