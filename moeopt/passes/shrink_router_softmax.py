"""Softmax over the experts a token keeps, not over all of them.

    softmax(l)[S] / sum(softmax(l)[S])  ==  softmax(l[S])        S = the top-k of l

The full denominator cancels in the division, and exp is increasing, so S does not change.

Shapes     T tokens, E experts, K = top-k:  l (T, E)  ->  weights (T, K), ids (T, K)
Seen in    Mixtral and its kin where the block itself has the routing (a router module of its own is kept whole)
Saves      a (T, E) softmax becomes a (T, K) one; the (T, K) sum and the division are gone: up to 2 % of a block with
           many small experts on ONNX Runtime's CPU provider, less than can be measured otherwise (benchmarks/passes.py)
Numerics   ROUNDING: weights move by some float32 eps. Ids differ or swap places where two logits round to one
           probability, which the comparison of ids counts as ties.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.errors import Declined
from moeopt.passes.base import Level
from moeopt.rewrite.block_graph import BlockGraph, node_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Renormalised:
    """The nodes of ``kept / sum(kept)`` with ``kept, ids = topk(softmax(logits), k)``."""

    softmax: fx.Node
    topk: fx.Node
    kept: fx.Node
    total: fx.Node
    weights: fx.Node


class ShrinkRouterSoftmax:
    """See the module's docstring."""

    name = "shrink_router_softmax"
    level = Level.ROUNDING
    engines_only = "in PyTorch the router stays the user's own"
    off = (
        "where two logits round to one probability it takes another expert than the model does (tiny rows, huge rows), "
        "and it saves 2 % at most (benchmarks/passes.py)"
    )

    def apply(self, block: BlockGraph) -> int:
        """How many routers have a smaller softmax.

        Raises:
            Declined: there is such a router, and its softmax is used otherwise too or runs in 16 bits.
        """
        found = list(renormalised(block.graph))
        for one in found:
            check(one)
        for one in found:
            shrink(block.graph, one)
        return len(found)


def renormalised(graph: fx.Graph) -> Iterator[Renormalised]:
    """Each top-k of a softmax over the last axis that is divided by its own sum."""
    for weights in graph.nodes:
        if op_name(weights) != "div" or len(weights.args) != 2 or weights.kwargs:
            continue
        kept, total = weights.args
        if not _is(total, "sum") or total.args[0] is not kept:
            continue
        if list(total.args[1:]) not in ([[-1], True], [[1], True]):  # over the kept experts, as a column
            continue
        if not _is(kept, "getitem") or kept.target is not operator.getitem or kept.args[1] != 0:
            continue
        topk = kept.args[0]
        if not _is(topk, "topk") or not _last_axis(topk, 2) or topk.args[3:4] not in ((), (True,)):
            continue
        softmax = topk.args[0]
        if _is(softmax, "_softmax") and _last_axis(softmax, 1) and len(softmax.meta.get("shape") or ()) == 2:
            yield Renormalised(softmax, topk, kept, total, weights)


def check(one: Renormalised) -> None:
    """Raise ``Declined`` where the full softmax is needed, or too narrow to keep ties rare."""
    where = one.weights.meta.get("source") or None
    for node, what in ((one.softmax, "softmax"), (one.kept, "top-k"), (one.total, "sum")):
        allowed = {one.topk, one.total, one.weights}
        other = next((user for user in node.users if user not in allowed), None)
        if other is not None:
            raise Declined(f"the router's {what} is also read by {node_name(other)}", where)
    dtype = one.softmax.meta.get("dtype")
    if dtype is not torch.float32:
        raise Declined(f"the router softmax runs in {dtype}; only float32 keeps ties rare", where)
    if one.softmax.args[2]:
        raise Declined("the router softmax widens half precision itself", where)


def shrink(graph: fx.Graph, one: Renormalised) -> None:
    """Choose among the logits, and take the softmax of those that are kept."""
    logits = one.softmax.args[0]
    one.topk.args = (logits, *one.topk.args[1:])
    with graph.inserting_before(one.total):
        small = graph.call_function(aten._softmax.default, (one.kept, -1, False))
    small.meta = dict(one.weights.meta)
    one.weights.replace_all_uses_with(small)
    for node in (one.weights, one.total, one.softmax):
        graph.erase_node(node)


def _is(value: object, name: str) -> bool:
    return isinstance(value, fx.Node) and op_name(value) == name


def _last_axis(node: fx.Node, position: int) -> bool:
    return len(node.args) <= position or node.args[position] in (-1, 1)
