"""The codes of an ONNX file for the experts of a region of it: where a matrix lies in its floats, its codes lie too.

A region is read as a module of floats that a file's codes stand for (``onnx_in.coded``). The experts that are found are
views of these floats, so the same view of the codes is an expert's, whatever the file's layout is:

    W (N, K), element (n, k) at offset + n * sn + k * sk of the floats     codes: the same elements
    scales: the block of element (n, k); blocks of a row that are alike for all rows become a format's

Every matrix is proved: what its codes stand for is compared with the floats, bit for bit. Shape legend: E experts, N
out, K in; S the shape of a constant in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.weight_format import WeightFormat
from moeopt.onnx_in.coded import CodedTensor
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.published.experts import BankStack, Unbound

_SCALES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_CODES = {(torch.int8, 8): "int8", (torch.uint8, 8): "uint8", (torch.int8, 4): "uint4", (torch.uint8, 4): "uint4"}
_CODES |= {(torch.float8_e4m3fn, 8): "e4m3"}
_LONGEST = 256
"""Columns of a row of 4 bits that is one block."""
_PLAIN = {"int8": 0, "uint8": 128, "uint4": 8, "e4m3": 0}
"""The zero point of a format that is symmetric."""


class FileExperts:
    """The coded constants of a file's regions.

    Args:
        coded: of all regions.
    """

    def __init__(self, coded: Sequence[CodedTensor]) -> None:
        self._by_storage = {one.floats.untyped_storage().data_ptr(): one for one in coded}

    def bank(
        self, block: str, experts: int, floats: Callable[[int], Sequence[Tensor]]
    ) -> tuple[QuantizedExpertWeights, bool] | None:
        """The codes of ``experts`` experts; see ``PublishedExperts.bank``. None where the file has them as floats.

        Raises:
            Unbound: an expert's weights are no part of one coded constant, or codes of a form that no bank has.
        """
        homes = [[self._home(w) for w in floats(e)] for e in range(experts)]
        if all(one is None for row in homes for one in row):
            return None
        every = [[_coded(one, block, e) for one in row] for e, row in enumerate(homes)]
        stacks = [BankStack(experts) for _ in every[0]]
        read: dict[int, Tensor] = {}
        plain_ones = {id(one): is_symmetric(one) for one in {id(one): one for row in every for one in row}.values()}
        symmetric = [all(plain_ones[id(row[slot])] for row in every) for slot in range(len(stacks))]
        for e in range(experts):
            read = {id(one): read[id(one)] for one in every[e] if id(one) in read}
            for stack, one, plain, w in zip(stacks, every[e], symmetric, floats(e), strict=True):
                if id(one) not in read:  # of a stack once for all of its experts, which hold no others' meanwhile
                    read[id(one)] = one.codes().contiguous()
                weight = matrix_of(one, read[id(one)], w, plain)
                if not torch.equal(weight.dequantize(w.dtype), w):
                    raise Unbound(
                        f"the codes of the node {one.node!r} do not stand for the floats that expert {e} of {block} is "
                        "read as"
                    )
                stack.put(e, weight)
        *ins, out = [stack.matrices() for stack in stacks]
        bank = QuantizedExpertWeights(ins, out)
        try:
            bank.check(block)
        except UsageError as err:
            raise Unbound(str(err)) from None
        return bank, True

    def _home(self, w: Tensor) -> CodedTensor | None:
        return self._by_storage.get(w.untyped_storage().data_ptr())


def _coded(one: CodedTensor | None, block: str, e: int) -> CodedTensor:
    if one is None:
        raise Unbound(f"a weight of expert {e} of {block} is plain floats, beside others that are codes")
    return one


def is_symmetric(one: CodedTensor) -> bool:
    """Whether each zero point is that of a symmetric format."""
    plain = _PLAIN[_kind(one)] - _shift(one)
    return plain == 0 if one.zeros is None else bool((one.zeros.to(torch.int32) == plain).all())


def _kind(one: CodedTensor) -> str:
    """What :class:`WeightFormat` calls the codes."""
    kind = _CODES.get((one.dtype, one.bits))
    if kind is None:
        raise Unbound(
            f"the node {one.node!r} has codes of {one.bits} bits ({one.dtype}), which experts have no format for"
        )
    return kind


def _shift(one: CodedTensor) -> int:
    """What is added to the file's codes of 4 bits that have a sign."""
    return 8 if one.bits == 4 and one.dtype == torch.int8 else 0


def matrix_of(one: CodedTensor, codes: Tensor, w: Tensor, symmetric: bool) -> QuantizedWeight:
    """The codes of a view ``w`` (N, K) of a coded constant's floats; ``codes`` are all of that constant's.

    Raises:
        Unbound: its scales lie in no blocks of rows and columns.
    """
    kind, offset = _kind(one), int(w.storage_offset() - one.floats.storage_offset())
    N, K = (int(n) for n in w.shape)
    down, across = (_places(one, offset, int(stride), n) for stride, n in zip(w.stride(), (N, K), strict=True))
    rows, columns = _run(down), _run(across)
    rows = rows or 1  # a scale for each row says the same, and kernels take that
    if kind == "uint4" and columns is None and K <= _LONGEST:
        columns = max(16, 1 << (K - 1).bit_length())  # a block longer than a row says the same, and kernels take blocks
    if columns == 0 or one.scales.dtype not in _SCALES or (kind == "e4m3" and not symmetric):
        raise Unbound(f"the scales of the node {one.node!r} are in blocks that no bank of experts has")
    at = down[::rows, None] + across[None, :: columns or K] - down[0]
    codes = torch.as_strided(codes, (N, K), w.stride(), offset)
    shift, zeros = _shift(one), None
    if not symmetric:
        held = torch.zeros(at.shape) if one.zeros is None else one.zeros.reshape(-1)[at]
        zeros = (held.to(torch.int16) + shift).to(torch.int8 if kind == "int8" else torch.uint8)
    if kind == "uint4":
        codes = _packed((codes.to(torch.int16) + shift).to(torch.uint8))
    format = WeightFormat(f"{kind} of the file", kind, (rows, columns), _SCALES[one.scales.dtype], symmetric=symmetric)
    return QuantizedWeight(codes.contiguous(), one.scales.reshape(-1)[at], zeros, format, (N, K))


def _places(one: CodedTensor, offset: int, stride: int, count: int) -> Tensor:
    """Which scale each of ``count`` elements has, ``stride`` apart from ``offset`` on."""
    left = offset + torch.arange(count) * stride
    at, shape, step = torch.zeros_like(left), one.floats.shape, 1
    for size, block, scales in zip(reversed(shape), reversed(one.block), reversed(one.scales.shape), strict=True):
        at += (left % size) // block * step
        left, step = left // size, step * scales
    return at


def _run(places: Tensor) -> int | None:
    """How many elements in a row share a scale; None where all do, 0 where they are not alike many."""
    changes = (places[1:] != places[:-1]).nonzero()
    if not len(changes):
        return None
    run = int(changes[0]) + 1
    return run if torch.equal(places, places[::run].repeat_interleave(run)[: len(places)]) else 0


def _packed(codes: Tensor) -> Tensor:
    """Codes of 4 bits (N, K), two in a byte, the first in the low half."""
    even = F.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4
