"""A row function's graph once per expert, on rows sorted by expert; no control flow that depends on data.

    x_TH --gather by sorted pair--> rows_NH --Split by count--> E parts (+ 1 for ids that name no expert)
    part e: the function's nodes with expert e's weights;  Concat, un-sort, weigh, sum over K

The way in and out is that of :mod:`.unrolled`. Shape legend: T tokens, K chosen per token, N = T K pairs, E experts,
H hidden, D output width.

    Nodes      E times the function's, and about 30
    Numerics   each pair's row is the reference's row; the K terms are summed in slot order
"""

from __future__ import annotations

import torch

from moeopt.backends.onnxrt.lowerings.unrolled import Sorted, combine
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import row_graph
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.lower.onnx.lowerings.weight_reads import experts_hit, weights_cost
from moeopt.value_types import OnnxValue


class UnrolledFunction:
    """The lowering ``"unrolled_function"``: every row function whose ops have an ONNX form."""

    name = "unrolled_function"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        if provider in ("tensorrt", "nv_tensorrt_rtx"):
            return "TensorRT does not split a tensor into parts whose sizes are known only at run time"
        if provider == "cpu" and torch.bfloat16 in (site.dtype, types_of(site).compute, types_of(site).accum):
            return "ONNX Runtime's CPU provider has no bfloat16 kernels; export a float32 copy of the model"
        return row_graph.refuses(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        nodes = 30 + len(site.spec.body.nodes) * site.bank.num_experts
        return weights_cost(site, experts_hit(site, tokens), tokens * site.top_k, nodes, syncs=1)  # one Split

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        function, types = row_graph.RowGraph(graph, site), types_of(site)
        rows = Sorted(graph, site, ids)
        x_NH = rows.rows(x, weights, site.spec.body.dtype)
        done = [function.expert(e, part) for e, part in enumerate(rows.parts(x_NH, "rows_of_experts"))]
        o_ND = rows.together(done, site.spec.body.out_features, types.compute, "outputs", "rows_of_none")
        return combine(graph, site, rows, o_ND, x, weights)
