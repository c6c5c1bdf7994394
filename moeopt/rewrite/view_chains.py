"""Chains of views after which every number of a tensor lies where it lay.

reshape, view, squeeze, unsqueeze      never change the order of a tensor's numbers
permute, transpose, movedim, t         keep it where the sizes that are not 1 stay in their order
"""

from __future__ import annotations

from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.rewrite.block_graph import EXPERTS

_RESHAPES = ("reshape", "view", "_unsafe_view")
_IN_ORDER = (*_RESHAPES, "squeeze", "unsqueeze")
_TURNS = ("permute", "transpose", "movedim", "t")


def unchanged_source(node: fx.Node) -> fx.Node | None:
    """The nearest node of which ``node`` is all numbers in their order and shape, through views alone; else None."""
    shape = node.meta.get("shape")
    if shape is None or None in shape:
        return None
    while op_name(node) in _IN_ORDER or (op_name(node) in _TURNS and _keeps_order(node)):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        if source.meta.get("shape") == shape:
            return source
        node = source
    return None


def farthest_source(node: fx.Node) -> fx.Node:
    """What ``node``, a reshape, may read in the place of its own operand, to the same numbers in the same memory.

    Between the two stand views that neither copy nor change the order, and reshapes that merge the same dimensions as
    ``node`` does: one of them copies a strided operand where ``node`` does, and nowhere else. Behind the experts' sum,
    whose rows lie one after the other, no reshape copies.
    """
    shape = node.meta.get("shape")
    farthest = source = node.args[0]
    same, turned = shape is not None and None not in shape, list[int]()
    while isinstance(source, fx.Node) and source.target is not EXPERTS:
        operand = source.args[0] if source.args else None
        if op_name(source) in _TURNS:
            order = _order(source, len(source.meta.get("shape") or ()))
            if order is None or not isinstance(operand, fx.Node):
                break
            turned = [order[place] for place in turned] if turned else order
            turned = [] if _in_order(turned, operand.meta.get("shape")) else turned
        elif turned or op_name(source) not in _IN_ORDER:
            break
        elif op_name(source) in _RESHAPES:
            same = same and _without_ones(source.meta.get("shape")) == _without_ones(shape)
        source = operand
        farthest = source if same and not turned else farthest
    if isinstance(source, fx.Node) and source.target is EXPERTS and not turned:
        return source
    assert isinstance(farthest, fx.Node)
    return farthest


def _in_order(places: list[int], shape: tuple[object, ...] | None) -> bool:
    """Whether the dimensions of ``shape`` that are not 1 stand in their order at ``places``."""
    kept = [place for place in places if shape is not None and shape[place] != 1]
    return shape is not None and kept == sorted(kept)


def _without_ones(shape: tuple[object, ...] | None) -> list[object] | None:
    return None if shape is None or None in shape else [size for size in shape if size != 1]


def read_once(node: fx.Node, source: fx.Node) -> bool:
    """Whether nothing but the chain from ``source`` to ``node`` reads ``source`` and what lies between."""
    while node is not source:
        node = node.args[0]  # type: ignore[assignment]
        if len(node.users) != 1:
            return False
    return True


def _keeps_order(node: fx.Node) -> bool:
    order, operand = _order(node, len(node.meta.get("shape") or ())), node.args[0]
    return order is not None and isinstance(operand, fx.Node) and _in_order(order, operand.meta.get("shape"))


def _order(node: fx.Node, rank: int) -> list[int] | None:
    """Of each dimension of the result, the operand's; None where the arguments are no plain numbers."""
    places = []
    for given in node.args[1:]:
        numbers = [p % rank for p in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(p, int)]
        if len(numbers) != (len(given) if isinstance(given, (list, tuple)) else 1):
            return None
        places.append(numbers)
    order = list(range(rank))
    if op_name(node) == "permute":
        return places[0]
    if op_name(node) == "movedim":
        rest = [d for d in order if d not in places[0]]
        for to, source in sorted(zip(places[1], places[0], strict=True)):
            rest.insert(to, source)
        return rest
    a, b = (places[0][0], places[1][0]) if op_name(node) == "transpose" else (0, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order
