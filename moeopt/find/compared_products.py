"""Places of mixtures whose experts are one matrix each, which all run, and of which a comparison keeps one result.

y = sum over e of (n == number_e) * f(x W_e)       n: an integer for each row, as a size of a patch or a domain
y = where(n == number_e, f(x W_e), y)              the same, one after another
y = sum over e of (sum over k of (ids_k == number_e) * w_k) * f(x W_e)       weights of the chosen, by comparisons
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from moeopt.capture.op_kinds import WEIGH, is_matmul, is_pointwise, moves_rows, op_name
from moeopt.capture.replay import ancestors
from moeopt.find.block_candidates import BlockCandidate, identity_of
from moeopt.find.forward_walk import ForwardWalk
from moeopt.find.unread_blocks import UnreadBlocks
from moeopt.recognise.gemm_sites import is_computed_weight, weight_and_operand

_STEPS = 64
"""Calls that are looked at on the way from a comparison to a product."""
_ONE_KEPT = (
    "its experts are one matrix each ({}), every row passes all of them, and a comparison with its number keeps one "
    "result: no kernel groups experts of one matrix, so this block stays as it is; to run each row's own alone, pick "
    "the rows: y[n == number] = expert(x[n == number])"
)


_SOME_WEIGHED = (
    "its experts are one matrix each ({}), every row passes all of them, and comparisons of the chosen numbers with "
    "each expert's own weigh the results: no kernel groups experts of one matrix, so this block stays as it is; to run "
    "the chosen alone, pick each expert's rows (torch.where(ids == number)), and add the results up by index_add"
)


def compared_products(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """The mixtures in the run of ``unread`` of whose results comparisons of one integer tensor keep one each."""
    nodes = unread.tape.nodes
    compared = [n for n in nodes if op_name(n) == "eq" and _numbers_of_rows(n) is not None]
    memo: dict[fx.Node, bool] = {}
    for node in nodes if compared else ():
        if is_computed_weight(node, memo):
            memo[node] = True
    kept: dict[fx.Node, dict[fx.Node, None]] = {}
    weighing = set[fx.Node]()
    for comparison in compared:
        products, weighed = _kept_by(comparison, memo)
        weighing.update(comparison.all_input_nodes[:1] if weighed else ())
        if len(products) == 1:
            kept.setdefault(comparison.all_input_nodes[0], {})[products[0]] = None
    for numbers, ran in kept.items():
        products = list(ran)
        count = len({identity_of(p) for p in products})
        if count < 2 or len({p.meta["shape"][-1] for p in products}) > 1:
            continue
        if not any(n.op == "placeholder" for n in ancestors([numbers])):
            continue
        read = [found for p in products if (found := weight_and_operand(p, memo)) is not None]
        paths = {str(n.target) for f in read for n in ancestors([f[0]]) if n.op == "get_attr"} & set(unread.named)
        inside = [set(unread.tape.stack(p.meta["call"])) for p in products]
        call = unread.tape.calls[max(set.intersection(*inside))]
        place = unread.place(call, products[0].meta["index"], count, {id(unread.named[p]) for p in paths})
        largest = max(sorted(paths), key=lambda path: unread.named[path].numel(), default="")
        reason = _SOME_WEIGHED if numbers in weighing else _ONE_KEPT
        yield dataclasses.replace(place, unread=reason.format(largest))


def _numbers_of_rows(comparison: fx.Node) -> fx.Node | None:
    """The integers that are compared with one number; None where others are, or floats."""
    first, *others = comparison.all_input_nodes
    dtype = first.meta.get("dtype")
    integer = dtype is not None and not dtype.is_floating_point and first.meta.get("shape", ()) != ()
    return first if integer and not others else None


def _kept_by(comparison: fx.Node, memo: dict[fx.Node, bool]) -> tuple[list[fx.Node], bool]:
    """The products with weights of whose results the ``comparison``, moved and cast, keeps some rows; and whether it
    picks a weight for them first."""
    weighed = False
    for node, user in (walk := ForwardWalk(comparison, _STEPS)):
        if op_name(user) in (*WEIGH, "where"):
            values = [a for a in user.args if isinstance(a, fx.Node) and a is not node][:1]  # where: the kept one
            found = [p for a in values if (p := _product_behind(a, memo)) is not None]
            if found or op_name(user) != "mul":
                return found, weighed
            weighed = True
        if moves_rows(user) or is_pointwise(user) or (weighed and op_name(user) == "sum"):
            walk.follow(user)
    return [], weighed


def _product_behind(node: fx.Node, memo: dict[fx.Node, bool]) -> fx.Node | None:
    """The product with a weight that ``node`` is made of by moving, adding and other element-wise calls."""
    for _ in range(_STEPS):
        if is_matmul(node):
            return node if weight_and_operand(node, memo) is not None else None
        inputs = [a for a in node.all_input_nodes if a.op != "get_attr" and not memo.get(a, False)]
        if not (moves_rows(node) or is_pointwise(node)) or not inputs:
            return None
        node = inputs[0]
    return None
