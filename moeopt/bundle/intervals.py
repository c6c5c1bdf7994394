"""Conditions on one size or one product of sizes, as the interval that they hold on.

    max(2, floor(2 * float(a * b) / 4)) == 9      ->     a * b is 18 to 21

An owner reads the second, and every runtime has the integers that check it. The interval is the one around the call
that was traced. Each whole number in it was tried, and so was each of the ``REACH`` numbers on both sides of it: where
one of those meets the condition too, the condition stays as it is. Beyond them the interval refuses, which is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moeopt.bundle.shape_guards import holds, value_of
from moeopt.value_types import FxArg, JsonValue, PyObject

REACH = 2048
"""How far a frozen size is looked for. A condition that still holds there has no bound worth naming."""
_COMPARED = ("==", "!=", "<", "<=", ">", ">=")


def simplified(conditions: Sequence[Any], example: Callable[[int], Sequence[int]]) -> list[Any]:
    """``conditions``, all those on one quantity as the interval that they are together, where they are one.

    ``example(leaf)`` is the shape of a leaf in the traced call.
    """
    groups: dict[str, list[Any]] = {}
    for condition in conditions:
        groups.setdefault(str(_quantity(condition) or condition), []).append(condition)
    found: list[Any] = []
    for group in groups.values():
        together = simplest(["and", *group], example) if len(group) > 1 else None
        alone = [simplest(condition, example) for condition in group]
        found += alone if together is None or together[1:] == group else [together]
    return [c for number, c in enumerate(found) if c not in found[:number]]


def simplest(condition: JsonValue, example: Callable[[int], Sequence[int]]) -> PyObject:
    """``condition``, or the interval that it is."""
    quantity = _quantity(condition)
    if quantity is None or _plain(condition, quantity):
        return condition
    once = _with_one_size(condition)

    def meets(number: int) -> bool:
        return holds([once], lambda leaf: (number,))

    here = value_of(quantity, example)
    if not meets(here):
        return condition
    low = high = here
    while low > 1 and here - low <= REACH and meets(low - 1):
        low -= 1
    while high - here <= REACH and meets(high + 1):
        high += 1
    around = [*range(max(1, low - REACH), low), *range(high + 1, high + REACH)]
    if high - here > REACH or any(meets(number) for number in around):
        return condition
    if low == high:
        return ["==", quantity, low]
    return ["<=", quantity, high] if low <= 1 else ["and", [">=", quantity, low], ["<=", quantity, high]]


def _quantity(node: FxArg) -> PyObject:
    """The one product of sizes that a condition is a function of; None where there are none or several."""
    found: list[Any] = []

    def walk(part: PyObject) -> None:
        if not isinstance(part, list):
            return
        product = _product(part)
        if product is None:
            for child in part[1:]:
                walk(child)
        elif product[1] not in found:
            found.append(product[1])

    walk(node)
    return _times(found[0]) if len(found) == 1 else None


def _product(node: FxArg) -> tuple[int, list[Any]] | None:
    """The number and the sizes, in order, that a product is made of; None for any other node, and for one without
    sizes."""
    if node[0] == "size":
        return 1, [node]
    if node[0] != "*":
        return None
    number, sizes = 1, list[Any]()
    for child in node[1:]:
        part = _product(child) if isinstance(child, list) else (child, []) if isinstance(child, int) else None
        if part is None:
            return None
        number, sizes = number * part[0], sizes + part[1]
    return (number, sorted(sizes)) if sizes else None


def _times(sizes: list[Any]) -> PyObject:
    product = sizes[0]
    for size in sizes[1:]:
        product = ["*", product, size]
    return product


def _plain(condition: JsonValue, quantity: PyObject) -> bool:
    """Whether it compares the quantity itself with a number."""
    name, *sides = condition
    others = [side for side in sides if not isinstance(side, list) or _product(side) != _product(quantity)]
    return name in _COMPARED and len(others) == 1 and not isinstance(others[0], list)


def _with_one_size(node: FxArg) -> PyObject:
    """``node`` with one size in place of the product."""
    if not isinstance(node, list):
        return node
    product = _product(node)
    if product is not None:
        return ["*", product[0], ["size", 0, 0]]
    return [node[0], *(_with_one_size(child) for child in node[1:])]
