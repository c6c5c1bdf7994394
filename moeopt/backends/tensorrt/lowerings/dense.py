"""Every expert on every token, as two batched matmuls: the form of :mod:`moeopt.lower.onnx.lowerings.dense`, any E.

On a GPU the price of many experts is memory and FLOPs, which the planner counts, and not a fixed number of them.
"""

from __future__ import annotations

from moeopt.backends.tensorrt.cost import GEMM_ROOM, sizes_for
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import dense
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost


class Dense(dense.Dense):
    """The lowering ``"dense"``: all specs but weights on the input of K > 1 experts."""

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        if site.spec.weight_on == "input" and site.top_k > 1:
            return "weights on the input differ for each of a token's slots; dense carries that for top_k 1 only"
        return banks.refuses_sizes(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        s = sizes_for(site, tokens)
        memory = s.E * s.T * (s.compute * (s.I + max(s.O, s.D)) + s.wider) + s.input_rows
        moved = s.E * s.expert + 2 * s.E * s.T * s.row
        return Cost(moved, 2.0 * s.weights * s.E * s.T, kernels=8, memory=memory + GEMM_ROOM)
