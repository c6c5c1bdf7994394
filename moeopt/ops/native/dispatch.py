"""What runs ``experts`` on a CPU: the kernel in C++ where there is one and it is the faster, else torch's matmuls."""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.every_ids import every_ids, names_every
from moeopt.ops.expert_weights import ExpertWeights, StackedExpertWeights
from moeopt.ops.kernels import every_expert
from moeopt.ops.kernels.cpu import experts_cpu
from moeopt.ops.kernels.few_calls import listed
from moeopt.ops.kernels.gemm import LARGE, MOST_ROWS, power_of_two
from moeopt.ops.measured import Way, fastest
from moeopt.ops.native.again import again, call
from moeopt.ops.native.call import transformed
from moeopt.ops.native.hidden import Hidden
from moeopt.ops.native.library import Library, library
from moeopt.ops.quantized_bank import QuantizedExpertWeights, check_bank
from moeopt.ops.reference import check, experts_reference
from moeopt.ops.unfit import Unfit

MOST_TOKENS = 1024
"""Tokens beyond which the answer does not change any more, where every expert takes all of them."""

MOST_EXPERTS = 8
"""Experts beyond which the answer does not change any more, where every expert takes all tokens."""

EveryWay = Literal["native", "torch", "neurons"]
"""The kernel in C++, torch's matmuls one expert after the other, or ``kernels.every_expert``."""

WORK = 1 << 24
"""Multiply-adds of one product of one measured call: a few milliseconds. One of small weights has four times as many
at most."""

MANY_ROWS = 16
"""Rows of an expert from which the sizes of small weights are asked about: the ends of a product's sums count there."""

SMALL_SIZES = 64, 1024
"""Sizes of small weights are told apart between these."""

LARGE_ADVANTAGE, SMALL_ADVANTAGE = 1.03, 1.1
"""How many times as fast torch's matmuls must be. A model's own small matrices and biases, which they read one by one,
take a tenth of their time; what is measured has neither."""


def experts_on_cpu(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec,
    hidden: Hidden | None = None,
) -> Tensor:  # fmt: skip
    """``experts_reference``, by the fastest kernel for this call; differentiable by ``torch.func`` only.

    Args:
        hidden: where the kernel in C++, if it runs, keeps what a backward pass reads.
    """
    if transformed():
        check(x_TH, ids_TK, weights_TK, bank, spec)
        return experts_reference(x_TH, ids_TK, weights_TK, bank.stacked() or bank, spec)  # fast kernels write in place
    native, remembered = library(), getattr(bank, "remembered", None)
    # its second entry are the weights, which live until the kernel has read them
    held = None if native is None or remembered is None else remembered(ids_TK.numel())
    known = None if held is None else held[0]
    if native is not None and known:
        known_TH = again(known, native.run, x_TH, ids_TK, weights_TK, spec, bank.num_experts, hidden)
        if known_TH is not None:
            return known_TH
    check(x_TH, ids_TK, weights_TK, bank, spec)
    bank = bank.stacked() or bank  # what is read more than once is looked up once
    way, every = "torch", ids_TK.numel() > 0 and names_every(ids_TK, bank.num_experts)
    if every:
        way = _way_for_every(native, x_TH, weights_TK, bank, spec)
        if way == "neurons":
            listed_bank = listed(bank)
            if every_expert.in_float32(listed_bank):
                return every_expert.every_expert(x_TH, weights_TK, listed_bank, spec)
            way = "native"
    elif ids_TK.numel() and native is not None and _is_faster(native, x_TH, ids_TK, bank, spec):
        way = "native"
    if way == "native" and native is not None:
        try:
            return call(native.run, x_TH, ids_TK, weights_TK, bank, spec, native.bit, known, hidden)
        except Unfit:
            pass  # what the kernel does not take, torch's matmuls do
    return experts_cpu(x_TH, every_ids(*ids_TK.shape) if every else ids_TK, weights_TK, bank, spec)


def quantized_on_cpu(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: QuantizedExpertWeights, spec: ExpertsSpec
) -> Tensor:
    """``experts_reference`` on quantised weights: by the kernel that reads codes, where there is one and it takes them.

    That is not measured first: torch's matmuls would make every expert that is hit float at each call.
    """
    of_one_call = getattr(bank, "of_one_call", None)
    bank = bank if of_one_call is None else of_one_call(ids_TK.numel())
    if ids_TK.numel() and (native := library()) is not None:
        remembered = getattr(bank, "remembered", None)
        # its second entry are the tensors, which live until the kernel has read them
        held = None if remembered is None else remembered(ids_TK.numel())
        known = None if held is None else held[0]
        done_TH = again(known, native.run, x_TH, ids_TK, weights_TK, spec, bank.num_experts) if known else None
        if done_TH is not None:
            return done_TH
        check_bank(bank, spec)
        check(x_TH, ids_TK, weights_TK, bank, spec)
        try:
            return call(native.run, x_TH, ids_TK, weights_TK, bank, spec, native.bit, known)
        except Unfit:
            pass
    check_bank(bank, spec)
    kernel = experts_reference if bank.rounds else experts_cpu  # torch has no product of rows of 8 bits and such codes
    return kernel(x_TH, ids_TK, weights_TK, bank, spec)


def _is_faster(native: Library, x: Tensor, ids: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> bool:
    dtype, numel = _w_out_kind(bank)
    rows, H = _rows(ids.numel(), bank.num_experts), x.shape[1]
    sizes = None if numel >= LARGE // 4 else (256, 256) if rows < MANY_ROWS else (_small(H), _small(numel // max(1, H)))
    return _native(native, rows, spec, x.dtype, dtype, sizes, torch.get_num_threads())


def _small(size: int) -> int:
    least, most = SMALL_SIZES
    return _two_steps(min(max(size, least), most))


def _two_steps(number: int) -> int:
    """The nearest of the numbers of which each doubling has two: 16, 24, 32, 48, 64 and so on."""
    step = 1 << (number.bit_length() - 2)
    return round(number / step) * step


def _w_out_kind(bank: ExpertWeights) -> tuple[torch.dtype, int]:
    """The dtype of the second matrices, and how many numbers one has."""
    kind: tuple[torch.dtype, int] | None = getattr(bank, "w_out_kind", None)
    if kind is None:
        w, count = (bank.w_out_s, bank.num_experts) if isinstance(bank, StackedExpertWeights) else (bank.w_out(0), 1)
        kind = w.dtype, w.numel() // count
    return kind


def _way_for_every(
    native: Library | None, x: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec
) -> EveryWay:
    """The quickest of all ways where every expert takes every row."""
    (T, H), E, (dtype, numel) = x.shape, bank.num_experts, _w_out_kind(bank)
    sizes = power_of_two(T, MOST_TOKENS), power_of_two(H, WORK), power_of_two(max(1, numel // H), WORK)
    neurons = T > 1 and E > 1 and dtype is torch.float32 and every_expert.fits(x, weights, spec)
    few = min(1 << (E - 1).bit_length(), MOST_EXPERTS)
    return _of_every(native, sizes, few, spec, x.dtype, dtype, neurons, torch.get_num_threads())


@functools.lru_cache(maxsize=4096)
def _rows(N: int, E: int) -> int:
    """About how many rows an expert has of N pairs, where chance chooses."""
    hit = E * (1 - (1 - 1 / E) ** N)
    rows = max(1, round(N / hit))
    return power_of_two(rows) if rows < MANY_ROWS else min(_two_steps(rows), MOST_ROWS)


@functools.cache
def _native(
    native: Library, rows: int, spec: ExpertsSpec, x: torch.dtype, w: torch.dtype, sizes: tuple[int, int] | None,
    threads: int,
) -> bool:  # fmt: skip
    """``sizes``: about the H and I of small weights; None for large ones, which come from memory."""
    del threads  # a part of the machine that the answer is for
    compute = spec.compute_dtype or str(x).removeprefix("torch.")
    question = (
        f"experts of {rows} rows, {compute}, W {str(w).removeprefix('torch.')} {spec.w_in_layout} {spec.w_out_layout}, "
        f"{'gated' if spec.gated else 'plain'}, {'large' if sizes is None else 'x'.join(map(str, sizes))}, {native.isa}"
    )
    try:
        advantage = LARGE_ADVANTAGE if sizes is None else SMALL_ADVANTAGE
        return fastest(question, lambda: _ways(native, rows, spec, x, w, sizes), "native", advantage) == "native"
    except Unfit:  # float64, an activation: what has no answer is not to be measured at each call
        return False


@functools.cache
def _of_every(
    native: Library | None, sizes: tuple[int, int, int], experts: int, spec: ExpertsSpec, x: torch.dtype,
    w: torch.dtype, neurons: bool, threads: int,
) -> EveryWay:  # fmt: skip
    """One measurement of every way that there is: nothing is grouped, and the library's products are long.

    How long a row is counts here, as torch makes three calls for each expert and no more. ``sizes``: T, H and I.
    """
    if native is None and not neurons:
        return "torch"
    T, H, I = sizes
    compute = spec.compute_dtype or str(x).removeprefix("torch.")
    question = (
        f"each of {experts} experts on {T} rows of {H}, {I} wide, {compute}, W {str(w).removeprefix('torch.')} "
        f"{spec.w_in_layout} {spec.w_out_layout}, {spec.rows}, {spec.activation}, {'' if neurons else 'no '}neurons, "
        f"{native.isa if native is not None else 'no kernel'}"
    )
    ways = functools.partial(_every_ways, native, sizes, experts, spec, x, w, neurons)
    default: EveryWay = "torch" if native is None else "native"
    try:
        return fastest(question, ways, default, LARGE_ADVANTAGE)  # type: ignore[return-value]
    except Unfit:  # the kernel does not take it: asked without it
        return _of_every(None, sizes, experts, spec, x, w, neurons, threads)


def _every_ways(
    native: Library | None, sizes: tuple[int, int, int], experts: int, spec: ExpertsSpec, x: torch.dtype,
    w: torch.dtype, neurons: bool,
) -> dict[str, Way]:  # fmt: skip
    """As many experts of those sizes, or of as many neurons as take a few milliseconds."""
    T, H, I = sizes
    E = max(2, min(experts, 2 * WORK // (T * H * I))) if experts > 1 else 1
    bank = _bank(E, H, max(64, min(I, WORK // (T * H))), spec, w)
    x_TH, weights_TE = torch.full((T, H), 0.5, dtype=x), torch.full((T, E), 0.5, dtype=x)
    ids_TE = every_ids(T, E)
    ways: dict[str, Way] = {"torch": lambda: experts_cpu(x_TH, ids_TE, weights_TE, bank, spec)}
    if neurons:
        ways["neurons"] = lambda: every_expert.every_expert(x_TH, weights_TE, bank, spec)
    if native is not None:
        ways["native"] = lambda: call(native.run, x_TH, ids_TE, weights_TE, bank, spec, native.bit)
    return ways


def _bank(E: int, H: int, I: int, spec: ExpertsSpec, w: torch.dtype) -> StackedExpertWeights:
    def matrix(out: int, into: int, layout: str) -> Tensor:
        return torch.full((E, out, into) if layout == "oi" else (E, into, out), 0.01, dtype=w)

    widths = {"plain": [I], "separate": [I, I]}.get(spec.rows, [2 * I])
    return StackedExpertWeights([matrix(n, H, spec.w_in_layout) for n in widths], matrix(H, I, spec.w_out_layout))


def _ways(
    native: Library, rows: int, spec: ExpertsSpec, x: torch.dtype, w: torch.dtype, sizes: tuple[int, int] | None
) -> dict[str, Way]:
    """Two experts that every token goes to, of the spec's function and of weights of those sizes, None: of large ones.

    For few rows the reading of large weights is what counts, so each call takes two others of them, from memory.
    """
    few = sizes is None and rows <= 4
    H, I = sizes or ((2048, 1536) if few else (1024, max(64, min(1024, WORK // (1024 * rows)))))
    E = 4 if few else 2
    bank = _bank(E, H, I, spec, w)
    x_TH, weights_TK = torch.full((rows, H), 0.5, dtype=x), torch.full((rows, 2), 0.5, dtype=x)
    turns = [torch.tensor([[e, e + 1]]).repeat(rows, 1) for e in range(0, E, 2)]
    by_native, by_torch = itertools.cycle(turns), itertools.cycle(turns)
    return {
        "native": lambda: call(native.run, x_TH, next(by_native), weights_TK, bank, spec, native.bit),
        "torch": lambda: experts_cpu(x_TH, next(by_torch), weights_TK, bank, spec),
    }
