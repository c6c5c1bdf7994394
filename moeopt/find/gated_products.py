"""Places of mixtures whose experts are one matrix each, which every row passes: a gate weighs them, and picks none.

    y = sum over e of gate(x)[e] * f(x W_e)        f is element-wise, or nothing

Such are mixed adapters that share their matrix down, one-layer experts of recommenders, blended projections. Looked for
from the gate, which has one number for each product and row: a softmax over heads or places weighs something else.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from torch import fx

from moeopt.capture.op_kinds import GATES, WEIGH, is_matmul, is_pointwise, moves_rows, op_name
from moeopt.find.block_candidates import BlockCandidate, identity_of, laid_out_flat, len_of_stack
from moeopt.find.light_sites import leaf_of
from moeopt.find.unread_blocks import UnreadBlocks
from moeopt.recognise.gemm_sites import weight_and_operand

_REASON = (
    "its experts are one matrix each, and every row passes all of them, weighed by a gate: the op would leave no "
    "product out, so this block stays as it is; to run a few experts for each row, choose them (topk of the gate's "
    "scores) and loop over the experts with the rows that chose them"
)
_STEPS = 256
"""Calls that are looked at on the way from a gate to its products."""


def gated_products(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """The mixtures that the gates in the run of ``unread`` weigh; those of one call that share products are one."""
    memo: dict[fx.Node, bool] = {}
    mixtures: list[tuple[int, dict[fx.Node, None]]] = []
    for gate in unread.tape.nodes:
        width, rows = _size_of(gate)
        by_name: dict[str, list[fx.Node]] = {}
        for product in _weighed(gate, memo) if width > 1 else ():
            path = _path(unread, product, memo)
            stack = path in unread.named and unread.named[path].dim() > 2
            by_name.setdefault(path if stack else re.sub(r"\d+", "#", path), []).append(product)
        together = [[p for same in by_name.values() for p in same]]  # some of its own, and some that others share
        for products in [*by_name.values(), *(together if len(by_name) > 1 else [])]:
            if not _one_each(products, width, rows) or any(
                _path(unread, p, memo) not in unread.named for p in products
            ):
                continue
            inside = [set(unread.tape.stack(p.meta["call"])) for p in (gate, *products)]
            home = max(set.intersection(*inside))
            shared = next(
                (held for call, held in mixtures if call == home and not held.keys().isdisjoint(products)), {}
            )
            if not shared:
                mixtures.append((home, shared))
            shared.update(dict.fromkeys(products))
    for home, held in mixtures:
        weights = {id(unread.named[path]) for p in held if (path := _path(unread, p, memo)) in unread.named}
        place = unread.place(unread.tape.calls[home], min(p.meta["index"] for p in held), _count(held), weights)
        yield dataclasses.replace(place, reason=_REASON)


def _size_of(gate: fx.Node) -> tuple[int, int]:
    """Over how many things a softmax or sigmoid is, and for how many rows; (0, 0) of another call."""
    shape = gate.meta.get("shape") or ()
    axis = -1 if op_name(gate) == "sigmoid" else gate.args[1] if op_name(gate) in GATES else None
    if not shape or not isinstance(axis, int) or not shape[axis]:
        return 0, 0
    return shape[axis], math.prod(shape) // shape[axis]


def _path(unread: UnreadBlocks, product: fx.Node, memo: dict[fx.Node, bool]) -> str:
    found = weight_and_operand(product, memo)
    return "" if found is None else leaf_of(unread.tape, found[0])[0]


def _count(products: Iterable[fx.Node]) -> int:
    """How many matrices they multiply by."""
    return sum(len_of_stack(p) for p in {identity_of(p): p for p in products}.values())


def _one_each(products: list[fx.Node], width: int, rows: int) -> bool:
    """Whether the ``products`` are by ``width`` different matrices of one shape, of as many ``rows`` as the gate has,
    or of several for each of the gate's."""
    if not products or _count(products) != width or len({p.meta["shape"][-1] for p in products}) > 1:
        return False
    weight, _, _ = weight_and_operand(products[0], {}) or (products[0], None, None)
    side_by_side = laid_out_flat(weight) > 1  # else a stack's rows lie one matrix behind the other
    each = math.prod(products[0].meta["shape"][:-1]) // (1 if side_by_side else len_of_stack(products[0]))
    return rows > 0 and each % rows == 0


def _weighed(gate: fx.Node, memo: dict[fx.Node, bool]) -> list[fx.Node]:
    """The products whose results the ``gate``, moved and cast, is multiplied with."""
    found: dict[fx.Node, None] = {}
    stack, seen = [gate], set[fx.Node]()
    while stack and len(seen) < _STEPS:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            others = [a for a in user.all_input_nodes if a is not node]
            behind = [p for a in others for p in _products_behind(a, memo)] if op_name(user) in WEIGH else []
            found.update(dict.fromkeys(behind))
            if not behind and (moves_rows(user) or is_pointwise(user)):
                stack.append(user)
    return list(found)


def _products_behind(node: fx.Node, memo: dict[fx.Node, bool]) -> list[fx.Node]:
    """The products with weights that ``node`` holds the results of: moved, or through something element-wise."""
    found: dict[fx.Node, None] = {}
    stack, seen = [node], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > _STEPS:
            return []
        if is_matmul(node):
            if weight_and_operand(node, memo) is None:
                return []
            found[node] = None
        elif moves_rows(node) or is_pointwise(node):
            stack.extend(node.all_input_nodes)
    return list(found)
