"""Chains of views after which every number of a tensor lies where it lay, in a tensor of the same shape.

reshape, view, squeeze, unsqueeze      never change the order of a tensor's numbers
permute, transpose, movedim, t         keep it where the sizes that are not 1 stay in their order
"""

from __future__ import annotations

from torch import fx

from moeopt.capture.op_kinds import op_name

_IN_ORDER = ("reshape", "view", "_unsafe_view", "squeeze", "unsqueeze")
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


def read_once(node: fx.Node, source: fx.Node) -> bool:
    """Whether nothing but the chain from ``source`` to ``node`` reads ``source`` and what lies between."""
    while node is not source:
        node = node.args[0]  # type: ignore[assignment]
        if len(node.users) != 1:
            return False
    return True


def _keeps_order(node: fx.Node) -> bool:
    shape = node.meta.get("shape")
    order = None if shape is None else _order(node, len(shape))
    if shape is None or order is None:
        return False
    kept = [place for place, size in zip(order, shape, strict=True) if size != 1]
    return kept == sorted(kept)


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
