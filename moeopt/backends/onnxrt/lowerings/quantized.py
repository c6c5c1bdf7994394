"""Quantised experts, one product per expert as in ``unrolled``: on codes where a kernel reads them, else on floats.

    unrolled-codes   com.microsoft::MatMulNBits(part, codes, scales): int4 in blocks; a session holds the codes
    unrolled-floats  MatMul(part, dequantised in the graph): any format; the file holds codes, a session holds floats

MatMulNBits computes in float32 at accuracy levels 0 to 3. At level 4 it rounds the activations to int8, which is as
large an error as the weights' own, and with 8 bits it makes the matrix float at each call (``int8_activations`` has the
table): neither is emitted.
Shape legend: E experts, N out, K in; b weights share a scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.backends.onnxrt.capability import DOMAIN
from moeopt.backends.onnxrt.lowerings.unrolled import Unrolled
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.codes import float_weight, is_quantized, matrices, row_order, scales_of
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.lower.onnx.lowerings.weight_reads import experts_hit, weights_cost
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.value_types import OnnxValue

ACCURACY_LEVEL = 1
"""Of MatMulNBits: float32 activations."""


class UnrolledFloats(Unrolled):
    """The lowering ``"unrolled-floats"``: carries every format."""

    name = "unrolled-floats"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        return super().refuses(site, provider) if is_quantized(site) else "its experts are floats"

    def product(self, graph: Builder, site: ExpertsNode, e: int, which: str, rows: OnnxValue) -> OnnxValue:
        weight = float_weight(graph, site, e, which, types_of(site).compute)
        return graph.op("MatMul", [rows, weight], name=f"expert.{e}/{which}")


class UnrolledCodes(Unrolled):
    """The lowering ``"unrolled-codes"``: 4 bits in blocks along the inputs, on a CPU."""

    name = "unrolled-codes"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        if not is_quantized(site):
            return "its experts are floats"
        if provider != "cpu":
            return f"MatMulNBits was not run on {provider}; unrolled-floats carries this"
        if types_of(site).compute != torch.float32:
            return f"MatMulNBits computes in float32 here, and the experts in {types_of(site).compute}"
        for matrix in (*site.bank.w_in_q, site.bank.w_out_q):
            format = matrix.matrix.format
            if format.codes != "uint4" or not format.symmetric or format.packing != "low nibble first":
                return f"MatMulNBits is quick with float32 activations for symmetric 4-bit codes only, not for {format}"
            rows, columns = format.block
            if rows != 1 or columns is None or columns < 16 or columns & (columns - 1):
                return f"MatMulNBits takes blocks of 16, 32, 64, ... inputs of one output, not {format}"
        return super().refuses(site, provider)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        nodes = 30 + 2 * site.bank.num_experts
        cost = weights_cost(site, experts_hit(site, tokens), tokens * site.top_k, nodes, syncs=2)
        return Cost(cost.moved / 7, cost.flops, cost.kernels, syncs=cost.syncs)  # 4.5 bits where 32 were counted

    def product(self, graph: Builder, site: ExpertsNode, e: int, which: str, rows: OnnxValue) -> OnnxValue:
        order = row_order(site.spec, site.bank.w_in_q[0].matrix.shape[0]) if which == "gate_up" else None
        done = [
            _product(graph, one, order, f"expert.{e}/{which}" + (f".{n}" if n else ""), rows)
            for n, one in enumerate(matrices(site, e, which))
        ]
        return done[0] if len(done) == 1 else graph.op("Concat", done, axis=1, name=f"expert.{e}/{which}")


def _product(graph: Builder, weight: QuantizedWeight, order: Tensor | None, name: str, rows: OnnxValue) -> OnnxValue:
    """``rows`` times the transpose of ``weight``, whose rows are taken in ``order``."""
    (N, K), b = weight.shape, weight.format.block[1]
    assert b is not None
    blob = graph.weight(f"{name}.codes", lambda: _blob(weight.codes, order, K, b), torch.uint8, (N, -(-K // b), b // 2))
    scales = scales_of(graph, weight, name)
    if order is not None:
        scales = graph.op("Gather", [scales, graph.const(order.tolist(), "int64")], axis=0)
    return graph.op(
        "MatMulNBits", [rows, blob, scales], domain=DOMAIN, name=name,
        K=K, N=N, bits=4, block_size=b, accuracy_level=ACCURACY_LEVEL,
    )  # fmt: skip


def _blob(codes: Tensor, order: Tensor | None, columns: int, block: int) -> Tensor:
    """Codes (N, ceil(K / 2)) as whole blocks (N, blocks, block / 2): bytes at the end stand for zeros, twice 8."""
    width = -(-columns // block) * block // 2
    full = F.pad(codes, (0, width - codes.shape[1]), value=0x88)
    full = full if order is None else full[order.to(full.device)]
    return full.reshape(full.shape[0], -1, block // 2)
