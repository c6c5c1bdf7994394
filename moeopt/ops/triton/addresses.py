"""The table of addresses through which the kernels find each expert's weights: nothing is stacked or copied.

Shape legend: E experts, I intermediate, H hidden, D out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights, StackedExpertWeights
from moeopt.ops.triton.constants import WeightTypes
from moeopt.ops.unfit import Unfit
from moeopt.value_types import PyObject

Geometry = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Weights(NamedTuple):
    """E experts' weights as the kernels take them. Steps are in elements: from one output to the next, one input to
    the next; ``table`` is (7, E) int64 addresses on the device of the weights. ``alive`` are the tensors that lie
    there, to be held until the kernels are launched: a bank may make a tensor at each read."""

    table: Tensor
    held: WeightTypes
    I: int  # noqa: E741
    D: int
    in_steps: tuple[int, int]
    out_steps: tuple[int, int]
    bias_steps: tuple[int, int, int]
    alive: tuple[Tensor, ...]


def weights_of(bank: ExpertWeights, spec: ExpertsSpec, H: int, device: torch.device) -> Weights:
    """The live addresses of ``bank``; looked at anew at each call, so a weight that moved is found where it is now.

    A bank that tells at once that all its weights lie where they lay (``lies``) is not read one by one again.

    Raises:
        Unfit: weights that differ between experts in shape, strides or dtype, or lie on another device.
    """
    stacked = bank.stacked()
    lies = None if stacked is not None else getattr(bank, "lies", None)
    now = None if lies is None else lies()
    if now is None:
        return _weights_of(bank, stacked, spec, H, device)
    held: PyObject = bank
    known = held.known
    if known is None or known[0] is not spec or known[1:4] != (H, device, now):
        found = _weights_of(bank, None, spec, H, device)
        known = held.known = spec, H, device, now, found._replace(alive=())  # the module holds them; this must not
    answer: Weights = known[4]
    return answer


def _weights_of(
    bank: ExpertWeights, stacked: StackedExpertWeights | None, spec: ExpertsSpec, H: int, device: torch.device
) -> Weights:
    parts = _stacked_parts(stacked) if stacked is not None else _listed_parts(bank)
    E, (w_in, w_in2, w_out, b_in, b_in2, b_out, norm) = bank.num_experts, parts
    matrices = [p for p in (w_in, w_in2, w_out) if p is not None]
    vectors = [p for p in (b_in, b_in2, b_out, norm) if p is not None]
    bias_dtype = _bias_dtype(matrices, vectors, device)
    assert w_in is not None and w_out is not None
    out_axis, into_axis = (0, 1) if spec.w_in_layout == "oi" else (1, 0)
    shape, stride, dtype = w_in.geometry
    I, step, first_gate, first_up = _halves(spec, shape[out_axis])
    in_steps = (stride[out_axis] * step, stride[into_axis])
    _check_pairs(spec, w_in, w_in2, b_in, b_in2)
    size = dtype.itemsize
    bias_size = bias_dtype.itemsize
    bias_in_step = b_in.geometry[1][0] if b_in is not None else 0
    joined = spec.gated and w_in2 is None

    w_in_up = _moved(w_in, first_up * stride[out_axis] * size, E) if joined else (w_in2 or w_in).addresses
    b_in_up = _moved(b_in, first_up * bias_in_step * bias_size, E) if joined else _moved(b_in2 or b_in, 0, E)
    rows = [
        _moved(w_in, first_gate * stride[out_axis] * size, E),
        w_in_up,
        w_out.addresses,
        _moved(b_in, first_gate * bias_in_step * bias_size, E),
        b_in_up,
        _moved(b_out, 0, E),
        _moved(norm, 0, E),
    ]
    if norm is not None and 0 in norm.addresses:
        raise Unfit("some experts have a norm weight and some have none")
    aligned = not any(a % 16 for row in rows[:3] for a in row)
    o_shape, o_stride, _ = w_out.geometry
    D, out_steps = (o_shape[0], (o_stride[0], o_stride[1])) if spec.w_out_layout == "oi" else (
        o_shape[1], (o_stride[1], o_stride[0]))  # fmt: skip
    into = o_shape[1 if spec.w_out_layout == "oi" else 0]
    if shape[into_axis] != H or into != I:
        raise Unfit(
            f"the weights' shapes {tuple(shape)} and {tuple(o_shape)} do not fit one another and x of width {H}"
        )
    held = WeightTypes(dtype, bias_dtype, b_in is not None, b_out is not None, norm is not None, aligned)
    bias_steps = (bias_in_step * step, b_out.geometry[1][0] if b_out else 0, norm.geometry[1][0] if norm else 0)
    return Weights(_table(tuple(map(tuple, rows)), device), held, I, D, in_steps, out_steps, bias_steps, _alive(parts))


class _Part(NamedTuple):
    geometry: Geometry
    device: torch.device
    addresses: Sequence[int]
    alive: tuple[Tensor, ...]


def _alive(parts: Sequence[_Part | None]) -> tuple[Tensor, ...]:
    return tuple([t for p in parts if p is not None for t in p.alive])


def _bias_dtype(matrices: Sequence[_Part], vectors: Sequence[_Part], device: torch.device) -> torch.dtype:
    """The dtype of the biases, that of the matrices where there is none; ``Unfit`` where either has several."""
    dtypes = {p.geometry[2] for p in matrices}
    bias_dtypes = {p.geometry[2] for p in vectors} or dtypes
    if len(dtypes) > 1 or len(bias_dtypes) > 1:
        raise Unfit(f"the experts' weights have different dtypes: {sorted(map(str, dtypes | bias_dtypes))}")
    if any(p.device != device for p in (*matrices, *vectors)):
        raise Unfit(f"some of the experts' weights are not on {device}")
    return next(iter(bias_dtypes))


def _check_pairs(spec: ExpertsSpec, w_in: _Part, w_in2: _Part | None, b_in: _Part | None, b_in2: _Part | None) -> None:
    """``Unfit`` where gate and up of separate matrices do not lie alike."""
    if w_in2 is not None and w_in2.geometry != w_in.geometry:
        raise Unfit("the experts' gate and up matrices differ in shape or strides")
    if b_in2 is not None and b_in is not None and b_in2.geometry != b_in.geometry:
        raise Unfit("the experts' gate and up biases differ in strides")
    if (b_in is None) != (b_in2 is None) and spec.rows == "separate":
        raise Unfit("one of the gate and up matmuls has a bias and the other none")


def _moved(part: _Part | None, by: int, experts: int) -> Sequence[int]:
    """The addresses of a part, ``by`` bytes further on; 0 where an expert has none."""
    if part is None:
        return [0] * experts
    return [a + by if a else 0 for a in part.addresses]


def _halves(spec: ExpertsSpec, rows: int) -> tuple[int, int, int, int]:
    """I, the rows from one gate to the next, and the first rows of gate and up in a matrix of ``rows`` rows."""
    if spec.rows in ("plain", "separate"):
        return rows, 1, 0, 0
    half = rows // 2
    return {
        "gate|up": (half, 1, 0, half),
        "up|gate": (half, 1, half, 0),
        "interleaved": (half, 2, 0, 1),
        "interleaved_up": (half, 2, 1, 0),
    }[spec.rows]


def _stacked_parts(bank: StackedExpertWeights) -> list[_Part | None]:
    def part(t: Tensor | None) -> _Part | None:
        if t is None:
            return None
        start, step = t.data_ptr(), t.stride(0) * t.itemsize
        addresses = [start + step * e for e in range(t.shape[0])]
        return _Part((t.shape[1:], t.stride()[1:], t.dtype), t.device, addresses, (t,))

    pair = [*bank.w_in_s, None][:2], [*bank.b_in_s, None][:2]
    return [part(t) for t in (*pair[0], bank.w_out_s, *pair[1], bank.b_out_s, bank.norm_s)]


def _listed_parts(bank: ExpertWeights) -> list[_Part | None]:
    every = range(bank.num_experts)
    ins, biases = list(zip(*map(bank.w_in, every), strict=True)), list(zip(*map(bank.b_in, every), strict=True))
    return [
        _listed("input weight", ins[0]),
        _listed("second input weight", ins[1]) if len(ins) > 1 else None,
        _listed("output weight", [bank.w_out(e) for e in every]),
        _listed("input bias", biases[0]),
        _listed("second input bias", biases[1]) if len(biases) > 1 else None,
        _listed("output bias", [bank.b_out(e) for e in every]),
        _listed("norm weight", [bank.norm(e) for e in every]),
    ]


def _listed(what: str, tensors: Sequence[Tensor | None]) -> _Part | None:
    """E tensors of one geometry, or None where all are absent; an absent one among present ones has address 0."""
    present = [t for t in tensors if t is not None]
    if not present:
        return None
    first = present[0]
    geometry = (first.shape, first.stride(), first.dtype)
    for e, t in enumerate(tensors):
        if t is not None and ((t.shape, t.stride(), t.dtype) != geometry or t.device != first.device):
            raise Unfit(
                f"the {what} of expert {e} is {tuple(t.shape)} {t.dtype} with strides {t.stride()}, and that of "
                f"another expert {tuple(first.shape)} {first.dtype} with strides {first.stride()}"
            )
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    return _Part(geometry, first.device, addresses, tuple(present))


@functools.lru_cache(maxsize=4096)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Addresses on the device. The addresses are the key, so no entry can be stale."""
    return torch.tensor(rows, dtype=torch.int64).to(device)
