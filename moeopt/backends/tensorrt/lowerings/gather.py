"""Each pair's own copy of its expert's weights, and one batched matmul: for a few tokens.

    W_NHO = W_in[ids];  h_N1O = x_N1H @ W_NHO;  a = gate(h);  o_N1D = a @ W_out[ids];  y_TD = sum over K of o w

It reads K experts a token and computes nothing else, and it writes N weights first, so its memory is N times an
expert's. Shape legend: T tokens, K chosen per token, N = T K pairs, H hidden, O columns of W_in, D output width.

    Nodes      about 20 for any E
    Numerics   each pair's row is the reference's row; the K terms are summed in slot order
"""

from __future__ import annotations

from moeopt.backends.tensorrt.cost import COPIED, GEMM_ROOM, routed_flops, sizes_for
from moeopt.backends.tensorrt.lowerings import pairs
from moeopt.backends.tensorrt.lowerings.stacked import Stacked
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.value_types import OnnxValue


class Gather:
    """The lowering ``"gather"``: carries every spec."""

    name = "gather"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        return banks.refuses_sizes(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        s = sizes_for(site, tokens)
        memory = s.N * (s.expert + s.compute * (s.H + s.O))
        moved = COPIED * s.N * s.expert + 2 * s.N * s.row
        return Cost(moved, routed_flops(s), kernels=12, memory=memory + GEMM_ROOM)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        size, K = banks.sizes_of(site), site.top_k

        def reshaped(value: OnnxValue, *shape: int) -> OnnxValue:
            return graph.op("Reshape", [value, graph.const(shape, "int64")])

        named_TK = pairs.named(graph, site, ids)
        index_TK = graph.op("Where", [named_TK, ids, graph.const(0, "int64")], name="expert_or_first")
        x_TKH = pairs.rows(graph, site, x, weights)
        x_N1H = reshaped(x_TKH, -1, 1, size.H)
        o_N1D = Stacked(graph, site).experts(x_N1H, reshaped(index_TK, -1), rank=3)
        return pairs.combine(graph, site, named_TK, ids, reshaped(o_N1D, -1, K, size.D), x, weights)
