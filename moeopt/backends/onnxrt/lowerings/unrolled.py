"""One MatMul per expert and weight, on rows sorted by expert; no control flow that depends on data.

    x_TH --gather by sorted pair--> rows_NH --Split by count--> E parts (+ 1 for ids that name no expert)
    part e: MatMul(part, W_in[e]);  Concat, bias, activation for all rows at once
    Split by count --> part e: MatMul(part, W_out[e]);  Concat, bias, norm, un-sort, weigh, sum over K

ONNX Runtime packs each constant weight once, when the session loads, and a part without rows costs its node
and nothing more. Shape legend: T tokens, K chosen per token, N = T K pairs, E experts, H hidden, O columns of
W_in (gate, up), I intermediate, D output width.

    Nodes      2E and about 35, 25 where every id is known to name an expert; on CPU quicker than
               com.microsoft::MoE, which packs weights at every call
    Numerics   each pair's row is the reference's row; the K terms are summed in slot order
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import middle, weights
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.types import cast, refuses_types, scalar, types_of, wide
from moeopt.lower.onnx.lowerings.weight_reads import experts_hit, weights_cost
from moeopt.value_types import OnnxValue


class Unrolled:
    """The lowering ``"unrolled"``: carries every spec in dtypes that the provider's MatMul has."""

    name = "unrolled"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        if provider in ("tensorrt", "nv_tensorrt_rtx"):
            return "TensorRT does not split a tensor into parts whose sizes are known only at run time"
        return refuses_types(site, provider) or weights.refuses_sizes(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        nodes = 30 + 2 * site.bank.num_experts
        return weights_cost(site, experts_hit(site, tokens), tokens * site.top_k, nodes, syncs=2)  # two Splits

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        rows = Sorted(graph, site, ids)
        x_NH = rows.rows(x, weights, types_of(site).compute)
        o_ND = _experts(graph, site, rows, x_NH, self.product)
        return combine(graph, site, rows, o_ND, x, weights)

    def product(self, graph: Builder, site: ExpertsNode, e: int, which: str, rows: OnnxValue) -> OnnxValue:
        """``rows`` times expert ``e``'s ``"gate_up"`` or ``"down"`` weight."""
        return graph.op("MatMul", [rows, weights.expert_weight(graph, site, e, which)], name=f"expert.{e}/{which}")


class Sorted:
    """The order of the N pairs by expert, and the way back."""

    def __init__(self, graph: Builder, site: ExpertsNode, ids_TK: OnnxValue) -> None:
        E = site.bank.num_experts
        self.graph, self.site, self.ids_TK = graph, site, ids_TK
        self._rest: OnnxValue = None

        def int64(value: OnnxValue) -> OnnxValue:
            return graph.const(value, "int64")

        self.named_TK, key_TK, self.groups = None, ids_TK, E
        if not site.named:
            above, below = graph.op("GreaterOrEqual", [ids_TK, int64(0)]), graph.op("Less", [ids_TK, int64(E)])
            self.named_TK, self.groups = graph.op("And", [above, below], name="names_an_expert"), E + 1
            key_TK = graph.op("Where", [self.named_TK, ids_TK, int64(E)], name="expert_or_none")
        key_N = graph.op("Reshape", [key_TK, int64([-1])])
        pairs = graph.op("Shape", [key_N])
        self.key_N, self.order_N = graph.op("TopK", [key_N, pairs], outputs=2, largest=0, name="sort_by_expert")
        # not a sum over a one-hot table: ONNX Runtime's int64 ReduceSum takes 14 ms for 4096 pairs and 128 experts
        none_E = graph.const([0] * self.groups, "int64")
        ones_N = graph.op("Expand", [int64([1]), pairs])
        self.counts = graph.op(
            "ScatterElements", [none_E, key_N, ones_N], axis=0, reduction="add", name="rows_per_expert"
        )
        iota_N = graph.op("Range", [int64(0), graph.op("Squeeze", [pairs]), int64(1)])
        place_N = graph.op("ScatterElements", [self.order_N, self.order_N, iota_N], axis=0)
        self.place_TK = graph.op("Reshape", [place_N, int64([-1, site.top_k])], name="place_of_pair")

    def parts(self, rows: OnnxValue, name: str) -> Sequence[OnnxValue]:
        """``rows`` (N, ·), sorted, as the rows of each expert."""
        found = self.graph.op("Split", [rows, self.counts], outputs=self.groups, axis=0, name=name)
        parts: Sequence[OnnxValue] = [found] if self.groups == 1 else found
        return parts[: self.site.bank.num_experts]

    def together(self, parts: list[OnnxValue], width: int, dtype: torch.dtype, name: str, none: str) -> OnnxValue:
        """The experts' results (N, width) in sorted order; zeros, named ``none``, for pairs that name no expert."""
        graph, E = self.graph, self.site.bank.num_experts
        if not self.site.named:
            if self._rest is None:
                self._rest = graph.op("Slice", [self.counts, *[graph.const([n], "int64") for n in (E, E + 1)]])
            shape = graph.op("Concat", [self._rest, graph.const([width], "int64")], axis=0)
            parts = [*parts, graph.op("Expand", [scalar(graph, 0.0, dtype), shape], name=none)]
        return graph.op("Concat", parts, axis=0, name=name)

    def rows(self, x: OnnxValue, weights: OnnxValue, dtype: torch.dtype) -> OnnxValue:
        """The rows that the experts read (N, H), in ``dtype``."""
        graph, site, types = self.graph, self.site, types_of(self.site)
        token_N = graph.op("Div", [self.order_N, graph.const(site.top_k, "int64")], name="token_of_row")
        x_NH = graph.op("Gather", [x, token_N], axis=0, name="rows")
        if site.spec.weight_on == "output":
            return cast(graph, x_NH, types.x, dtype)
        w_N = graph.op("Gather", [graph.op("Reshape", [weights, graph.const([-1], "int64")]), self.order_N], axis=0)
        w_N1 = graph.op("Unsqueeze", [cast(graph, w_N, types.weights, types.input_term), graph.const([1], "int64")])
        x_NH = graph.op("Mul", [cast(graph, x_NH, types.x, types.input_term), w_N1])
        return cast(graph, x_NH, types.input_term, dtype)


ExpertProduct = Callable[[Builder, ExpertsNode, int, str, OnnxValue], OnnxValue]


def _experts(graph: Builder, site: ExpertsNode, rows: Sorted, x_NH: OnnxValue, product: ExpertProduct) -> OnnxValue:
    """Every expert on its rows: (N, D) in the compute dtype; zeros for pairs that name no expert."""
    size, compute = weights.sizes_of(site), types_of(site).compute

    def products(value: OnnxValue, which: str, width: int) -> OnnxValue:
        parts = rows.parts(value, f"{which}_parts")
        done = [product(graph, site, e, which, part) for e, part in enumerate(parts)]
        return rows.together(done, width, compute, which, f"{which}_of_none")

    def added(value: OnnxValue, table: OnnxValue) -> OnnxValue:
        if table is None:
            return value
        return graph.op("Add", [value, graph.op("Gather", [table, rows.key_N], axis=0)])

    h_NO = added(products(x_NH, "gate_up", size.O), weights.b_in_table(graph, site))
    a_NI = middle.gate(graph, site, h_NO, size.O)
    o_ND = added(products(a_NI, "down", size.D), weights.b_out_table(graph, site))
    if site.spec.out_norm_eps is None:
        return o_ND
    table = weights.norm_table(graph, site, wide(compute))
    gathered = None if table is None else graph.op("Gather", [table, rows.key_N], axis=0)
    return middle.rms_norm(graph, site, o_ND, gathered, axis=1)


def combine(
    graph: Builder, site: ExpertsNode, rows: Sorted, o_ND: OnnxValue, x: OnnxValue, weights_TK: OnnxValue
) -> OnnxValue:
    """Back to the tokens' order, times the routing weights, summed over K."""
    spec, types = site.spec, types_of(site)

    def int64(value: OnnxValue) -> OnnxValue:
        return graph.const(value, "int64")

    o_TKD = graph.op("Gather", [o_ND, rows.place_TK], axis=0, name="rows_by_token")
    if spec.weight_on == "output":
        w_TK = weights_TK
        if rows.named_TK is not None:
            zero = scalar(graph, 0.0, types.weights)
            w_TK = graph.op("Where", [rows.named_TK, weights_TK, zero], name="weight_or_none")
        w_TK1 = graph.op("Unsqueeze", [cast(graph, w_TK, types.weights, types.term), int64([-1])])
        o_TKD = graph.op("Mul", [cast(graph, o_TKD, types.compute, types.term), w_TK1], name="weighted")
    o_TKD = cast(graph, o_TKD, types.term, types.accum)
    if spec.out_of_range == "identity":
        beyond_TK = graph.op("GreaterOrEqual", [rows.ids_TK, int64(site.bank.num_experts)])
        beyond_TK1 = graph.op("Unsqueeze", [beyond_TK, int64([-1])])
        x_T1D = graph.op("Unsqueeze", [cast(graph, x, types.x, types.input_term), int64([1])])
        w_TK1 = graph.op("Unsqueeze", [cast(graph, weights_TK, types.weights, types.input_term), int64([-1])])
        same_TKD = cast(graph, graph.op("Mul", [x_T1D, w_TK1]), types.input_term, types.accum)
        o_TKD = graph.op("Where", [beyond_TK1, same_TKD, o_TKD], name="expert_or_identity")
    y_TD = graph.op("ReduceSum", [o_TKD, int64([1])], keepdims=0, name="sum_over_chosen")
    return cast(graph, y_TD, types.accum, types.out)
