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

from moeopt.backends.tensorrt.lowerings.sort import blocks_of
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.types import types_of

GEMM_ROOM = 8_192_000
"""What TensorRT for RTX 1.7.1 adds to every engine that has a matmul."""
LAUNCH = 5e-6
_COPIED = 3


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
class Work:
    """What a form does for some number of tokens.

    Args:
        memory: bytes of activations that the builder plans.
        moved: bytes of weights and activations that are read or written.
        flops: of the matmuls.
        kernels: launches.
    """

    memory: float
    moved: float
    flops: float
    kernels: float


def work(name: str, site: ExpertsNode, tokens: int) -> Work:
    """What the form ``name`` does for ``tokens`` tokens, at least 1."""
    spec, size, types = site.spec, banks.sizes_of(site), types_of(site)
    T, E, K = max(tokens, 1), size.E, site.top_k
    N, b, a = T * K, _bytes(types.compute), _bytes(types.accum)
    by_slot = spec.weight_on == "input"
    R = N if by_slot else T
    weights = size.H * size.O + size.I * size.D
    biases = (size.O if banks.has_b_in(site.bank) else 0) + (size.D if banks.has_b_out(site.bank) else 0)
    expert, row = b * (weights + biases), b * (size.H + size.O + size.I + size.D)
    input_rows = b * R * size.H if by_slot or types.x != types.compute else 0
    middle = size.O + size.I + size.D if by_slot else size.I + max(size.O, size.D)  # the output takes the first's room
    wider = (a + b) * size.D if a > b else 0  # the products and their wider twins are both there
    if name == "dense":
        memory = E * T * (b * (size.I + max(size.O, size.D)) + wider) + input_rows
        return Work(memory + GEMM_ROOM, E * expert + 2 * E * T * row, 2.0 * weights * E * T, 8)
    if name == "loop":
        memory = expert + R * (b * middle + a * size.D + wider) + input_rows
        return Work(memory + GEMM_ROOM, _COPIED * E * expert + 2 * E * R * row, 2.0 * weights * E * R, 6 + 6 * E)
    if name == "gather":
        memory = N * (expert + b * (size.H + size.O))
        return Work(memory + GEMM_ROOM, _COPIED * N * expert + 2 * N * row, 2.0 * weights * N, 12)
    if name == "sort":
        L, B = blocks_of(N, E)
        # the pairs' rows by token are fused away where the profile is made for more than 8 tokens: a third less then
        memory = expert + b * (L * B * size.D + (R + 1) * size.H + B * (size.H + size.O + size.I))
        memory += max(b * N * size.D, 16 * N * E)
        moved = _COPIED * L * expert + 2 * L * B * row + 32 * N * E
        return Work(memory + GEMM_ROOM, moved, 2.0 * weights * L * B, 20 + 6 * L)
    assert name == "trt-moe", name
    hit = E * (1 - (1 - min(K / E, 1.0)) ** T)
    return Work(N * row + GEMM_ROOM, hit * expert + 2 * N * row, 2.0 * weights * N, 6)


def seconds(done: Work, device: ReferenceGPU, dtype: torch.dtype) -> float:
    """How long that takes on ``device`` with products in ``dtype``; see the module's docstring."""
    gemm = device.single if dtype == torch.float32 else device.half
    return max(done.moved / device.read, done.flops / gemm) + done.kernels * LAUNCH


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()
