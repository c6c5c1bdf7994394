"""A row function's graph in an ONNX ``Loop`` over the experts, on every token: one copy of its nodes for any E.

    y = 0;  for e in 0..E-1:  y += where(e chosen by the token, f(x, slot_1[e], slot_2[e], ...) w_e, 0)

The tensors of each slot are one constant with the expert first, and a turn takes its expert's out of each. The way
around the experts is that of :mod:`.loop`. Shape legend: T tokens, R rows (T, or T K with weights on the input),
E experts, H hidden, D output width.

    Nodes      those of the function and about 30, for any E
    Numerics   the sum runs over e in the accumulator's dtype
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moeopt.backends.tensorrt.lowerings.loop import OneExpert, loop_over_experts
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import row_graph
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.weight_reads import weights_cost
from moeopt.ops.row_function import SlotBank
from moeopt.value_types import OnnxValue


class LoopFunction:
    """The lowering ``"loop_function"``: every row function whose ops have an ONNX form."""

    name = "loop_function"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        return row_graph.refuses(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        E, rows = site.bank.num_experts, tokens * (site.top_k if site.spec.weight_on == "input" else 1)
        return weights_cost(site, experts=E, rows=rows * E, kernels=6 + (len(site.spec.body.nodes) + 6) * E)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        body, bank = site.spec.body, site.bank
        function = row_graph.RowGraph(graph, site)
        stacks = [
            graph.weight(f"slot.{p}", functools.partial(_all_experts, bank, p), t.dtype, (bank.num_experts, *t.shape))
            for p, t in enumerate(bank.slots(0))
        ]

        def on(x_RH: OnnxValue, e: OnnxValue) -> OnnxValue:
            return function.on("each", x_RH, [graph.op("Gather", [stack, e], axis=0, name="slot") for stack in stacks])

        one = OneExpert(on, body.dtype, bank.num_experts, body.features, body.out_features)
        return loop_over_experts(graph, site, one, x, ids, weights)


def _all_experts(bank: SlotBank, p: int) -> Tensor:
    """The tensors of slot ``p``, the expert first."""
    return torch.stack([bank.slots(e)[p].detach().cpu() for e in range(bank.num_experts)])
