"""A plan for every size as a :class:`BlockGraph`: each step a node, each size read off the inputs.

``Size(dims=((0, 0), (0, 1)))`` becomes ``sym_size(input_0, 0) * sym_size(input_0, 1)``, once for all its uses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moeopt.capture.tree import tree_map
from moeopt.rewrite.block_graph import CONSTANT, EXPERTS, BlockGraph, Slot
from moeopt.rewrite.kept_steps import KeptStep, KeptSteps, StepRef
from moeopt.rewrite.symbolic_shapes import DeviceOf, Ratio, Size
from moeopt.value_types import PyObject

aten = torch.ops.aten

_KINDS = (StepRef, Size, Ratio, DeviceOf)


def build(block: BlockGraph, plan: KeptSteps) -> None:
    """Make ``plan`` the graph of ``block``, whose own code it replaces."""
    builder = _GraphBuilder(plan)
    block.made, block.constants = builder.graph, builder.constants
    leaves: list[fx.Node] = []

    def place(leaf: PyObject) -> Slot:
        leaves.append(builder.word(leaf))
        return Slot(len(leaves) - 1)

    block.output, block.mutations, values = tree_map(
        _KINDS, place, (plan.output, plan.mutations, list(plan.attributes.values()))
    )
    block.attributes = dict(zip(plan.attributes, values, strict=True))
    builder.graph.output(tuple(leaves))
    block.captured = None


class _GraphBuilder:
    def __init__(self, plan: KeptSteps) -> None:
        self.graph = fx.Graph()
        self.constants: list[torch.Tensor] = []
        self._inputs: list[fx.Node] = []
        self._sizes: dict[Size, Any] = {}
        self._refs: list[fx.Node] = []
        self._block = self.graph.placeholder("block")
        for step in plan.steps:
            node = self._node(step)
            node.meta.update(source=step.source, shape=step.shape, dtype=step.dtype)
            self._refs.append(node)

    def _node(self, step: KeptStep) -> fx.Node:
        graph = self.graph
        if step.kind == "input":
            self._inputs.append(graph.placeholder(f"input_{len(self._inputs)}"))
            return self._inputs[-1]
        if step.kind == "attr":
            return graph.get_attr(step.target)
        if step.kind == "constant":
            self.constants.append(step.target)
            return graph.call_function(CONSTANT, (self._block, len(self.constants) - 1, self._inputs[0]))
        args, kwargs = self._words(step.args), self._words(step.kwargs)
        if step.kind == "module":
            return graph.call_module(step.target, args, kwargs)
        if step.kind == "experts":
            return graph.create_node("call_function", EXPERTS, (self._block, step.target, *args), {}, "experts")
        return graph.call_function(step.target, args, kwargs)

    def _words(self, tree: PyObject) -> PyObject:
        return tree_map(_KINDS, self.word, tree)

    def word(self, leaf: PyObject) -> PyObject:
        """The node that computes ``leaf``."""
        if isinstance(leaf, StepRef):
            return self._refs[leaf.step]
        if isinstance(leaf, Ratio):
            total = self._size(Size(leaf.dims))
            return self.graph.call_function(operator.truediv if leaf.inverse else operator.mul, (leaf.factor, total))
        if isinstance(leaf, DeviceOf):
            return self.graph.call_function(getattr, (self._inputs[0], "device"))
        return self._size(leaf)

    def _size(self, expr: Size) -> PyObject:
        if expr not in self._sizes:
            total: PyObject = None
            for index, dim in expr.dims:
                part = self.graph.call_function(aten.sym_size.int, (self._inputs[index], dim))
                total = part if total is None else self.graph.call_function(operator.mul, (total, part))
            for op, by, idle in (
                (operator.mul, expr.factor, 1),
                (operator.floordiv, expr.divisor, 1),
                (operator.add, expr.offset, 0),
            ):
                total = total if by == idle else self.graph.call_function(op, (total, by))
            self._sizes[expr] = total
        return self._sizes[expr]
