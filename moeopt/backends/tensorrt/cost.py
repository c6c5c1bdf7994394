"""What a form costs on a target: the activation memory that the builder will plan, and an estimate of its time.

Memory is counted from the buffers that the built engines have, at the largest number of tokens, and is what the
tests hold the builder's own figures to: 0.9 to 1.35 of them, but on sm_75 dense takes up to a fifth more.
Time for T tokens is

    max(bytes / read, FLOPs / gemm) + kernels * LAUNCH

A loop copies one expert's weights at each turn and gather copies a pair's: read, written, read again. Rates are round
figures of data sheets and were not measured: only their ratios matter here. Shape legend: T tokens, K chosen per
token, N = T K pairs, E experts, R rows of a loop, H hidden, O columns of W_in, I intermediate, D output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.types import types_of

GEMM_ROOM = 8_192_000
"""What TensorRT for RTX 1.7.1 adds to every engine that has a matmul."""
LAUNCH = 5e-6
COPIED = 3
"""A weight that a loop or a gather copies is read, written and read again."""


@dataclass(frozen=True)
class ReferenceGPU:
    """The smallest common device of a compute capability.

    Args:
        memory: bytes.
        read: bytes a second.
        half, single: FLOPs a second of products in 16 bits, and in float32 without TF32.
    """

    name: str
    memory: float
    read: float
    half: float
    single: float


DEVICES = {
    75: ReferenceGPU("T4", 16e9, 0.32e12, 65e12, 8e12),
    80: ReferenceGPU("A100 40 GB", 40e9, 1.55e12, 312e12, 19e12),
    86: ReferenceGPU("A10", 24e9, 0.6e12, 125e12, 31e12),
    89: ReferenceGPU("L4", 24e9, 0.3e12, 121e12, 30e12),
    90: ReferenceGPU("H100", 80e9, 3.3e12, 989e12, 67e12),
    100: ReferenceGPU("B200", 180e9, 8e12, 2250e12, 75e12),
    103: ReferenceGPU("B300", 270e9, 8e12, 2250e12, 75e12),
    110: ReferenceGPU("Thor", 128e9, 0.27e12, 250e12, 8e12),
    120: ReferenceGPU("RTX 5090", 32e9, 1.8e12, 209e12, 105e12),
    121: ReferenceGPU("GB10", 128e9, 0.27e12, 125e12, 31e12),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes, in bytes and rows, that each form's cost is written with.

    Args:
        N: pairs of token and expert.
        R: rows of a loop: N where the weights are on the input, else one a token.
        weights: elements of one expert's two matrices.
        expert: bytes of one expert, with biases.
        row: bytes of one row at each of its widths.
        input_rows: bytes of the tokens' rows, where they are cast or weighted first.
        wider: bytes that one row's wider twin of the output takes beside the output; 0 where the sum is no wider.
        compute, accum: bytes of one element.
    """

    T: int
    E: int
    N: int
    R: int
    H: int
    O: int
    I: int
    D: int
    weights: int
    expert: int
    row: int
    input_rows: int
    wider: int
    compute: int
    accum: int


def sizes_for(site: ExpertsNode, tokens: int) -> Sizes:
    """The sizes of ``site`` for ``tokens`` tokens, at least 1."""
    spec, size, types = site.spec, banks.sizes_of(site), types_of(site)
    T, E = max(tokens, 1), size.E
    N, b, a = T * site.top_k, types.compute.itemsize, types.accum.itemsize
    by_slot = spec.weight_on == "input"
    R = N if by_slot else T
    weights = size.H * size.O + size.I * size.D
    biases = (size.O if banks.has_b_in(site.bank) else 0) + (size.D if banks.has_b_out(site.bank) else 0)
    return Sizes(
        T, E, N, R, size.H, size.O, size.I, size.D, weights,
        expert=b * (weights + biases),
        row=b * (size.H + size.O + size.I + size.D),
        input_rows=b * R * size.H if by_slot or types.x != types.compute else 0,
        wider=(a + b) * size.D if a > b else 0,
        compute=b,
        accum=a,
    )  # fmt: skip


def routed_flops(s: Sizes) -> float:
    """FLOPs of the two products on the chosen experts alone."""
    return 2.0 * s.weights * s.N


def seconds(cost: Cost, device: ReferenceGPU, dtype: torch.dtype) -> float:
    """How long a call of that cost takes on ``device`` with products in ``dtype``; see the module's docstring."""
    gemm = device.single if dtype == torch.float32 else device.half
    return max(cost.moved / device.read, cost.flops / gemm) + cost.kernels * LAUNCH
