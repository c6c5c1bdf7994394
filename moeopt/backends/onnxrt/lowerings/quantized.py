"""Quantised experts, one product per expert as in ``unrolled``: on codes where a kernel reads them, else on floats.

    unrolled-codes   com.microsoft::MatMulNBits(part, codes, scales, zeros?): int4 in blocks; a session holds the codes
    unrolled-bytes   the same with 8 bits: a session holds the codes, and makes one matrix float at each call
    unrolled-floats  MatMul(part, dequantised in the graph): any format; the file holds codes, a session holds floats

MatMulNBits computes in float32 at accuracy levels 0 to 3. At level 4 it rounds the activations to int8, which is as
large an error as the weights' own (``int8_activations`` has the table): a graph gets that level on request only, once
it was verified without (``rounded_activations``). With 8 bits the matrix
that is made float costs more than the product of a few rows, so ``unrolled-bytes`` is for those who ask for memory
(``mapped=True``) and not for speed.
Shape legend: E experts, N out, K in; b weights share a scale.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.backends.onnxrt.capability import DOMAIN
from moeopt.backends.onnxrt.lowerings.unrolled import Unrolled
from moeopt.ir.weight_format import WeightFormat
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.codes import float_weight, is_quantized, matrices, row_order, scales_of
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.lower.onnx.lowerings.weight_reads import experts_hit, weights_cost
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.value_types import OnnxValue

ACCURACY_LEVELS = {4: 1, 8: 0}
"""Bits -> of MatMulNBits: activations are float32. By the operator's schema 0 means that they are not quantised."""
WIDEST = 256
"""The longest block of MatMulNBits: versions before 1.32 refuse longer ones, and a graph is for every version."""
ROUNDED_BLOCK = 128
"""The same where activations are rounded to int8 with a scale a block: shorter blocks lose less of them."""


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
    widest = WIDEST
    reads = 1 / 7
    """The time of reading an expert's weights, beside that of reading them as floats: 4.5 bits where 32 are counted."""

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        if not is_quantized(site):
            return "its experts are floats"
        if provider != "cpu":
            return f"MatMulNBits was not run on {provider}; unrolled-floats carries this"
        if types_of(site).compute != torch.float32:
            return f"MatMulNBits computes in float32 here, and the experts in {types_of(site).compute}"
        for matrix in (*site.bank.w_in_q, site.bank.w_out_q):
            if reason := self.refuses_format(matrix.matrix.format):
                return reason
        return super().refuses(site, provider)

    def refuses_format(self, format: WeightFormat) -> str:
        """Why weights of ``format`` are not read as codes; "" where they are."""
        if format.codes != "uint4" or format.packing != "low nibble first":
            return f"MatMulNBits is quick with float32 activations for 4-bit integers only, not for {format}"
        rows, columns = format.block
        return "" if rows == 1 and _is_block(columns) else _OTHER_BLOCKS.format(format)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        nodes = 30 + 2 * site.bank.num_experts
        cost = weights_cost(site, experts_hit(site, tokens), tokens * site.top_k, nodes, syncs=2)
        return dataclasses.replace(cost, moved=self.reads * cost.moved)

    def product(self, graph: Builder, site: ExpertsNode, e: int, which: str, rows: OnnxValue) -> OnnxValue:
        order = row_order(site.spec, site.bank.w_in_q[0].matrix.shape[0]) if which == "gate_up" else None
        done = [
            product_on_codes(graph, one, order, f"expert.{e}/{which}" + (f".{n}" if n else ""), rows, self.widest)
            for n, one in enumerate(matrices(site, e, which))
        ]
        return done[0] if len(done) == 1 else graph.op("Concat", done, axis=1, name=f"expert.{e}/{which}")


class UnrolledBytes(UnrolledCodes):
    """The lowering ``"unrolled-bytes"``: 8 bits, in blocks along the inputs or with a scale for each row, on a CPU.

    Args:
        widest: inputs of the longest block that a row with one scale is written as.
    """

    name = "unrolled-bytes"
    reads = 8.0
    """Each matrix is made float, one code after the other, written, and read again: 8 to 40 were measured."""

    def __init__(self, widest: int = WIDEST) -> None:
        self.widest = widest

    def refuses_format(self, format: WeightFormat) -> str:
        """As the base class has it."""
        if format.codes not in ("int8", "uint8"):
            return f"it is for 8-bit integers, not for {format}"
        rows, columns = format.block
        return "" if rows == 1 and (columns is None or _is_block(columns)) else _OTHER_BLOCKS.format(format)


_OTHER_BLOCKS = "MatMulNBits takes blocks of 16, 32, 64, 128 or 256 inputs of one output, not {}"


def _is_block(columns: int | None) -> bool:
    return columns is not None and 16 <= columns <= WIDEST and not columns & (columns - 1)


def product_on_codes(
    graph: Builder,
    weight: QuantizedWeight,
    order: Tensor | None,
    name: str,
    rows: OnnxValue,
    widest: int = WIDEST,
) -> OnnxValue:
    """A MatMulNBits node: ``rows`` times the transpose of ``weight``, whose rows are taken in ``order``."""
    (N, K), bits = weight.shape, weight.format.bits
    b = weight.format.block[1] or _row_block(K, widest)
    blocks = -(-K // b)
    blob = graph.weight(
        f"{name}.codes", lambda: _blob(weight, order, blocks, b), torch.uint8, (N, blocks, b * bits // 8)
    )
    scales = scales_of(graph, weight, name)
    if order is not None:
        scales = graph.op("Gather", [scales, graph.const(order.tolist(), "int64")], axis=0)
    if weight.format.block[1] is None and blocks > 1:
        scales = graph.op("Expand", [scales, graph.const([N, blocks], "int64")])
    reads = [rows, blob, scales]
    if weight.zeros is not None:
        shape = (N, -(-blocks * bits // 8))
        reads.append(graph.weight(f"{name}.zeros", lambda: _zeros(weight, order, blocks), torch.uint8, shape))
    return graph.op(
        "MatMulNBits", reads, domain=DOMAIN, name=name,
        K=K, N=N, bits=bits, block_size=b, accuracy_level=ACCURACY_LEVELS[bits],
    )  # fmt: skip


def _zeros(weight: QuantizedWeight, order: Tensor | None, blocks: int) -> Tensor:
    """Zero points (N, blocks), unsigned; those of 4 bits two in a byte, the first in the low half."""
    assert weight.zeros is not None
    held = weight.zeros.view(torch.uint8) ^ 0x80 if weight.zeros.dtype == torch.int8 else weight.zeros
    held = (held if order is None else held[order.to(held.device)]).expand(-1, blocks)
    if weight.format.bits == 8:
        return held.contiguous()
    even = F.pad(held, (0, held.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def _row_block(columns: int, widest: int) -> int:
    """The block with which a row of ``columns`` codes takes the fewest bytes, zeros at its end and scales included."""
    sizes = [1 << n for n in range(4, widest.bit_length())]
    return min(sizes, key=lambda b: -(-columns // b) * (b + 4))


def _blob(weight: QuantizedWeight, order: Tensor | None, blocks: int, block: int) -> Tensor:
    """Codes as whole blocks (N, blocks, bytes), unsigned about a zero point of 8 or 128: what is added means zero."""
    held, bits = weight.codes, weight.format.bits
    codes = held.view(torch.uint8) ^ 0x80 if held.dtype == torch.int8 else held
    full = F.pad(codes, (0, blocks * block * bits // 8 - codes.shape[1]), value=0x88 if bits == 4 else 0x80)
    full = full if order is None else full[order.to(full.device)]
    return full.reshape(full.shape[0], blocks, -1)
