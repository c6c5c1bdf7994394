"""Pairs sorted by expert into blocks of rows of one expert each, and an ONNX ``Loop`` over the blocks.

    count the pairs of each expert; expert e gets ceil(count / B) blocks; a pair's place is its rank in its expert
    for b in 0..blocks-1:  o_b = expert[b](rows of block b)          y_TD = sum over K of o[place] w

Nothing is dropped and no size depends on data: a block has the mean rows of an expert, in steps of 64, and N pairs
with at most m = min(N, E) experts hit fill at most (N - m) // B + m blocks, whatever the routing. Rows of a block
that no pair fills are zero. The rank is a running count and not a TopK, which TensorRT limits to 3840 values. Shape
legend: T tokens, K chosen per token, N = T K pairs, E experts, B rows of a block, L blocks, P = L B places, H hidden,
D output width.

    Costs      each expert is read about twice, its padding is at most as many rows again as there are
    Nodes      about 80 for any E
    Numerics   each pair's row is the reference's row; the K terms are summed in slot order
"""

from __future__ import annotations

from typing import Any

from moeopt.backends.tensorrt.cost import COPIED, GEMM_ROOM, sizes_for
from moeopt.backends.tensorrt.lowerings import pairs
from moeopt.backends.tensorrt.lowerings.looped import looped
from moeopt.backends.tensorrt.lowerings.stacked import Stacked
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.types import cast, scalar, types_of
from moeopt.value_types import OnnxValue

STEP = 64
"""A block's rows are a multiple of this: so many rows of a product take a GPU no longer than reading its weight."""


def blocks_of(pairs: int, experts: int) -> tuple[int, int]:
    """L and B: the most blocks that ``pairs`` pairs can fill, at least 1, and the rows of each."""
    rows = max(-(-pairs // (experts * STEP)), 1) * STEP
    hit = min(pairs, experts)
    return max((pairs - hit) // rows + hit, 1), rows


class Sort:
    """The lowering ``"sort"``: carries every spec."""

    name = "sort"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        return banks.refuses_sizes(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        s = sizes_for(site, tokens)
        L, B = blocks_of(s.N, s.E)
        # the pairs' rows by token are fused away where the profile is made for more than 8 tokens: a third less then
        memory = s.expert + s.compute * (L * B * s.D + (s.R + 1) * s.H + B * (s.H + s.O + s.I))
        memory += max(s.compute * s.N * s.D, 16 * s.N * s.E)
        moved = COPIED * L * s.expert + 2 * L * B * s.row + 32 * s.N * s.E
        return Cost(moved, 2.0 * s.weights * L * B, kernels=20 + 6 * L, memory=memory + GEMM_ROOM)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        types, size, K = types_of(site), banks.sizes_of(site), site.top_k
        named_TK = pairs.named(graph, site, ids)
        order = _Order(graph, site, named_TK, ids)
        if site.spec.weight_on == "input":
            rows = graph.op("Reshape", [pairs.rows(graph, site, x, weights), graph.const([-1, size.H], "int64")])
            row_LB = order.pair_LB
        else:
            rows = cast(graph, x, types.x, types.compute)
            row_LB = graph.op("Div", [order.pair_LB, graph.const(K, "int64")], name="token_of_place")
        none_1H = graph.op("Expand", [scalar(graph, 0.0, types.compute), graph.const([1, size.H], "int64")])
        rows = graph.op("Concat", [rows, none_1H], axis=0, name="rows_and_none")
        stacked = Stacked(graph, site)

        def one_block(b: OnnxValue) -> tuple[list[Any], list[Any]]:
            x_BH = graph.op("Gather", [rows, graph.op("Gather", [row_LB, b], axis=0)], axis=0, name="rows_of_block")
            e = graph.op("Gather", [order.expert_L, b], axis=0, name="expert_of_block")
            return [], [stacked.experts(x_BH, e, rank=2)]

        o_LBD = looped(graph, "blocks", order.blocks, [], [], one_block)
        o_PD = graph.op("Reshape", [o_LBD, graph.const([-1, size.D], "int64")])
        o_TKD = graph.op("Gather", [o_PD, order.place_TK], axis=0, name="rows_by_token")
        return pairs.combine(graph, site, named_TK, ids, o_TKD, x, weights)


class _Order:
    """Where each pair's row goes, and which pair and expert each place has.

    Attributes:
        blocks: L, an int64 scalar.
        expert_L: the expert of each block; the last one for blocks that are not used.
        pair_LB: the pair at each place; N where there is none.
        place_TK: the place of each pair; 0 for pairs that name no expert.
    """

    def __init__(self, graph: Builder, site: ExpertsNode, named_TK: OnnxValue, ids_TK: OnnxValue) -> None:
        self.graph, E = graph, site.bank.num_experts
        zero, int64 = graph.const(0, "int64"), self._int64
        named_N = graph.op("Reshape", [named_TK, int64([-1])])
        id_N1 = graph.op("Reshape", [ids_TK, int64([-1, 1])])
        mine_NE = graph.op("Equal", [id_N1, int64(list(range(E)))], name="chosen")
        one_NE = graph.op("Where", [mine_NE, int64(1), zero])
        N = graph.op("Squeeze", [graph.op("Shape", [named_N])], name="pairs")
        hit = graph.op("Min", [N, int64(E)])
        steps = graph.op("Div", [graph.op("Add", [N, int64(E * STEP - 1)]), int64(E * STEP)])
        self.B = graph.op("Mul", [graph.op("Max", [steps, int64(1)]), int64(STEP)], name="rows_of_block")
        # Min changes nothing, and tells TensorRT, which bounds N and B apart when it plans memory
        full = graph.op("Min", [graph.op("Div", [graph.op("Sub", [N, hit]), self.B]), int64(E)])
        self.blocks = graph.op("Max", [graph.op("Add", [full, hit]), int64(1)], name="blocks_at_most")
        count_E = graph.op("ReduceSum", [one_NE, int64([0])], keepdims=0, name="rows_per_expert")
        needed_E = graph.op("Div", [graph.op("Sub", [graph.op("Add", [count_E, self.B]), int64(1)]), self.B])
        end_E = graph.op("CumSum", [needed_E, zero], name="end_of_expert")
        first_E = graph.op("Mul", [graph.op("Sub", [end_E, needed_E]), self.B], name="first_place_of_expert")
        rank_NE = graph.op("CumSum", [one_NE, zero], exclusive=1, name="rank_in_expert")
        place_NE = graph.op("Where", [mine_NE, graph.op("Add", [rank_NE, first_E]), zero])
        place_N = graph.op("ReduceSum", [place_NE, int64([1])], keepdims=0, name="place")
        self.place_TK = graph.op("Reshape", [place_N, int64([-1, site.top_k])])
        self.pair_LB = self._pairs(place_N, named_N, N)
        b_L1 = graph.op("Unsqueeze", [graph.op("Range", [zero, self.blocks, int64(1)]), int64([1])])
        over_LE = graph.op("Where", [graph.op("LessOrEqual", [end_E, b_L1]), int64(1), zero])
        passed_L = graph.op("ReduceSum", [over_LE, int64([1])], keepdims=0)
        self.expert_L = graph.op("Min", [passed_L, int64(E - 1)], name="expert_of_blocks")

    def _pairs(self, place_N: OnnxValue, named_N: OnnxValue, N: OnnxValue) -> OnnxValue:
        """The inverse of ``place_N``: pairs without an expert are sent behind the last place, each to its own."""
        graph, int64 = self.graph, self._int64
        P = graph.op("Mul", [self.blocks, self.B], name="places")
        iota_N = graph.op("Range", [int64(0), N, int64(1)])
        target_N = graph.op("Where", [named_N, place_N, graph.op("Add", [iota_N, P])])
        room = graph.op("Unsqueeze", [graph.op("Add", [P, N]), int64([0])])
        empty = graph.op("Expand", [N, room])
        filled = graph.op("ScatterElements", [empty, target_N, iota_N], axis=0, name="pair_of_place")
        P_1 = graph.op("Unsqueeze", [P, int64([0])])
        pair_P = graph.op("Slice", [filled, int64([0]), P_1, int64([0])])
        shape = graph.op("Concat", [int64([-1]), graph.op("Unsqueeze", [self.B, int64([0])])], axis=0)
        return graph.op("Reshape", [pair_P, shape])

    def _int64(self, value: OnnxValue) -> OnnxValue:
        return self.graph.const(value, "int64")
