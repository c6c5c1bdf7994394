"""Copies and views that change nothing are gone from what stays around the experts.

    clone(a)               ==  a        where nothing else can see that it was another tensor
    reshape(a, shape of a) ==  a        and view, expand, permute, slice that give back all of a in its order
    views(y)               ==  y        the experts' sum y in its own shape and order, after several views
    reshape(views(a))      ==  reshape(a)   views that neither copy nor change the order

A view stays where it is itself a result of the block, but where nothing else holds the experts' sum under it. A copy
stays where its result, or a view of it, leaves the block or enters a kept module, which might hand it on: then writing
to one would change the other. A copy also stays where its operand may be strided and a product follows, since another
layout may take another kernel, and other bits.

Shapes     any
Seen in    blocks that keep ``residual = x.clone()`` for a later sum; the views that an einsum leaves
Saves      the time and memory of one tensor for each copy; a view saves its call
Numerics   EXACT: the same bits
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.passes.base import Level
from moeopt.rewrite.block_graph import EXPERTS, BlockGraph
from moeopt.rewrite.check import viewed
from moeopt.rewrite.view_chains import farthest_source, read_once, unchanged_source

_VIEWS = ("reshape", "view", "_unsafe_view", "expand", "slice", "permute")
_SIZES = (torch.ops.aten.sym_size.int, operator.mul, operator.add, operator.floordiv)
_ANY_LAYOUT = {"add", "sub", "mul", "div", "neg", "where", "cat", "stack", "index", "index_select", "gather", "clone"}
"""Ops that give the same bits whatever the strides of their operands are."""


class DropCopies:
    """See the module's docstring."""

    name = "drop_copies"
    level = Level.EXACT

    def apply(self, block: BlockGraph) -> int:
        """How many calls are gone."""
        fired = 0
        for node in list(block.graph.nodes):
            if node.op != "call_function":
                continue
            if (whole := _whole_sum(block, node)) is not None:
                fired += _drop_chain(block, node, whole)
                continue
            if node in block.leaves:
                continue
            if _is_idle_view(node) or (_is_idle_copy(node) and not _leaves(node)):
                node.replace_all_uses_with(node.args[0])
                block.graph.erase_node(node)
                fired += 1
        fired += sum(_shortened(block, node) for node in list(block.graph.nodes) if op_name(node) == "reshape")
        for node in reversed(list(block.graph.nodes)):
            if node.target in _SIZES and not node.users:
                block.graph.erase_node(node)
        return fired


def _whole_sum(block: BlockGraph, node: fx.Node) -> fx.Node | None:
    """The experts' sum (a fresh tensor, its rows one after the other) that views up to ``node`` give back as it is."""
    source = unchanged_source(node)
    if source is None or source.target is not EXPERTS:
        return None
    return source if node not in block.leaves or read_once(node, source) else None


def _drop_chain(block: BlockGraph, node: fx.Node, source: fx.Node) -> int:
    """Let ``source`` stand for ``node``; how many views are gone."""
    node.replace_all_uses_with(source)
    gone = 0
    while node is not source and not node.users:
        before: fx.Node = node.args[0]  # type: ignore[assignment]
        block.graph.erase_node(node)
        node, gone = before, gone + 1
    return gone


def _shortened(block: BlockGraph, node: fx.Node) -> int:
    """Let a reshape read what stands before the views before it; how many views are gone."""
    source, view, gone = farthest_source(node), node.args[0], 0
    node.args = (source, *node.args[1:])
    while view is not source and isinstance(view, fx.Node) and not view.users:
        before = view.args[0]
        block.graph.erase_node(view)
        view, gone = before, gone + 1
    return gone


def _is_idle_view(node: fx.Node) -> bool:
    """Whether ``node`` gives back its whole operand in the same order."""
    if op_name(node) not in _VIEWS or not isinstance(node.args[0], fx.Node):
        return False
    shape: tuple[object, ...] | None = node.meta.get("shape")
    if shape is None or None in shape or shape != node.args[0].meta.get("shape"):
        return False
    if op_name(node) == "permute":
        return list(node.args[1]) == list(range(len(shape)))  # type: ignore[arg-type]
    return op_name(node) != "slice" or len(node.args) < 5 or node.args[4] in (1,)


def _is_idle_copy(node: fx.Node) -> bool:
    """Whether ``node`` copies a tensor whose layout does not matter to anything that reads the copy."""
    if op_name(node) != "clone" or node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    fresh = source.op == "call_function" and viewed(source) is None and _is_op(source)
    return fresh or all(_takes_any_layout(user) for user in node.users)


def _takes_any_layout(user: fx.Node) -> bool:
    if user.op == "call_function" and viewed(user) is not None:
        return op_name(user) in ("unsqueeze", "select", "slice", "expand") and all(map(_takes_any_layout, user.users))
    return user.op == "call_function" and op_name(user) in _ANY_LAYOUT


def _leaves(node: fx.Node) -> bool:
    """Whether the result of ``node``, or something that may be a view of it, leaves the block."""
    for user in node.users:
        if user.op in ("output", "call_module"):
            return True
        if (viewed(user) is not None or not _is_op(user)) and _leaves(user):
            return True
    return False


def _is_op(node: fx.Node) -> bool:
    """Whether the schema of ``node`` says what its result may be a view of."""
    return isinstance(node.target, torch._ops.OpOverload) or node.target is EXPERTS
