"""The part of a lowering's cost that is the same for each: weights read once an expert, multiplied once a row.

    expected experts hit by T tokens     E (1 - (1 - K / E)^T)
    bytes and FLOPs                      4 bytes a weight of each expert that is read; 2 FLOPs a weight and row

Weights count as float32, in which the CPU's products run. Shape legend: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import math

from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.ops.quantized_bank import QuantizedExpertWeights


def experts_hit(site: ExpertsNode, tokens: int) -> float:
    """How many of the experts at least one of ``tokens`` tokens chooses, if each choice is equally likely."""
    E, K = int(site.bank.num_experts), site.top_k
    return E * (1 - (1 - min(K / E, 1.0)) ** tokens)


def weights_cost(
    site: ExpertsNode, experts: float, rows: float, kernels: float, syncs: float = 0.0, slowdown: float = 1.0
) -> Cost:
    """The cost of reading the weights of ``experts`` experts and multiplying ``rows`` rows by one expert's each."""
    function = isinstance(site.spec, RowFunction)
    if isinstance(site.bank, QuantizedExpertWeights):
        elements = sum(math.prod(m.shape) for m in (*site.bank.format.w_in, site.bank.format.w_out))
    else:
        of_one = site.bank.slots(0) if function else (*site.bank.w_in(0), site.bank.w_out(0))
        elements = sum(w.numel() for w in of_one)
    return Cost(4.0 * elements * experts, 2.0 * elements * rows, kernels, syncs=syncs, slowdown=slowdown)
