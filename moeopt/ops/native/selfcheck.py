"""Small random blocks over the fields of the spec, run by the kernel and by the reference: at each first load.

The budget is that of the test suite: the two differ in how sums are ordered, one rounding of a stage in its dtype.
"""

from __future__ import annotations

import itertools

import torch

from moeopt.ir.specs import ExpertsSpec, Layout, Rows
from moeopt.ir.weight_format import (
    INT4_ASYMMETRIC32,
    INT4_BLOCK32,
    INT8_BLOCK32,
    INT8_CHANNEL,
    UINT8_CHANNEL,
    WeightFormat,
)  # fmt: skip
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights, StackedExpertWeights
from moeopt.ops.native.call import NATIVE_ACTIVATIONS, NativeRun, call
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.ops.reference import experts_reference
from moeopt.ops.rounded_rows import ROW_BLOCK, STEPS
from moeopt.ops.unfit import Unfit

E, K, H, I = 3, 2, 40, 24
MANY = 70
"""Rows of one expert: more than any tile has, with enough work for several threads."""
ALPHA = {"swish": 1.702, "softcap": 2.0, "leaky_relu": 0.1, "elu": 1.5}
_ROWS: tuple[Rows, ...] = ("gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain")


def specs() -> list[ExpertsSpec]:
    """Each value of each field in some spec."""
    layouts: list[tuple[Layout, Layout]] = [("oi", "io"), ("io", "oi"), ("oi", "oi")]
    found = [
        ExpertsSpec(rows=rows, w_in_layout=first, w_out_layout=second)
        for rows, (first, second) in zip(_ROWS, itertools.cycle(layouts))
    ]
    found += [ExpertsSpec(activation=name, alpha=ALPHA.get(name)) for name in NATIVE_ACTIVATIONS]
    return [
        *found,
        ExpertsSpec(rows="interleaved", w_in_layout="io", gate_max=0.5, up_min=-0.4, up_max=0.4, up_offset=1.0),
        ExpertsSpec(gate_min=-0.3, act_min=-0.1, act_max=0.3, out_of_range="identity", combine="expert"),
        ExpertsSpec(out_norm_eps=1e-2, weight_on="input"),
        ExpertsSpec(compute_dtype="float32", act_dtype="bfloat16", accum_dtype="float32", out_dtype="float16"),
        ExpertsSpec(compute_dtype="bfloat16", act_dtype="float32", accum_dtype="float16"),
        ExpertsSpec(compute_dtype="float16", out_norm_eps=1e-2),
    ]


def first_difference(run: NativeRun, isa: int) -> str:
    """What the kernel computes otherwise than the reference, in words; "" where it computes the same."""
    rng = torch.Generator().manual_seed(0)
    layouts: tuple[Layout, ...] = ("oi", "io")
    with torch.no_grad():
        for number, spec in enumerate(specs()):
            whole = not (spec.compute_dtype or spec.act_dtype or spec.accum_dtype or spec.out_dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if whole else [])):
                bank, D = _bank(spec, dtype, rng, stacked=number % 2 == 0)
                T = 1 + number % 11
                x, ids, weights = _call(T, dtype, rng)
                want = experts_reference(x, ids, weights, bank, spec)
                try:
                    got = call(run, x, ids, weights, bank, spec, isa)
                except Unfit as err:
                    return f"{spec}, {dtype}: {err}"
                names = [spec.compute_dtype, spec.act_dtype, spec.accum_dtype, spec.out_dtype]
                eps = max(torch.finfo(d).eps for d in [dtype, *(getattr(torch, n) for n in names if n)])
                far = (got.double() - want.double()).abs().max().item()
                if got.dtype != want.dtype or not far <= 16 * eps * (want.double().abs().max().item() + 1):
                    return f"{spec}, {str(dtype).removeprefix('torch.')}: {far:.1e} apart"
        if found := next(filter(None, (_many_rows_differ(run, isa, layout, rng) for layout in layouts)), ""):
            return found
        checks = [(_codes_differ, format) for format in (INT8_CHANNEL, UINT8_CHANNEL, INT4_BLOCK32)]
        rounded = (INT8_CHANNEL, INT8_BLOCK32, UINT8_CHANNEL, INT4_BLOCK32, INT4_ASYMMETRIC32)
        checks += [(_rounded_rows_differ, format) for format in rounded]
        return next(filter(None, (differ(run, isa, format, rng) for differ, format in checks)), "")


def _many_rows_differ(run: NativeRun, isa: int, layout: Layout, rng: torch.Generator) -> str:
    """What the kernel computes otherwise in bfloat16 where an expert has many rows, or for one of them alone."""
    spec = ExpertsSpec(w_in_layout=layout, w_out_layout=layout)
    sizes = [(MANY + 10, MANY), (MANY, (MANY + 10) // 2)]
    w_in, w_out = ((torch.randn(1, *size, generator=rng) / size[1] ** 0.5).bfloat16() for size in sizes)
    if layout == "io":
        w_in, w_out = w_in.transpose(1, 2).contiguous(), w_out.transpose(1, 2).contiguous()
    bank = StackedExpertWeights([w_in], w_out)
    x, ids = torch.randn(MANY, MANY, generator=rng).bfloat16(), torch.zeros(MANY, 1, dtype=torch.int64)
    args = x, ids, torch.ones(MANY, 1).bfloat16()
    try:
        got = call(run, *args, bank, spec, isa)
        rows = [slice(t, t + 1) for t in (0, MANY - 1)]
        alone = [call(run, x[row], ids[row], args[2][row], bank, spec, isa) for row in rows]
    except Unfit as err:
        return f"{spec}, {MANY} rows: {err}"
    want = experts_reference(*args, bank, spec)
    far = (got.double() - want.double()).abs().max().item()
    if not far <= 16 * torch.finfo(torch.bfloat16).eps * (want.double().abs().max().item() + 1):
        return f"{spec}, bfloat16, {MANY} rows: {far:.1e} apart"
    if not torch.equal(torch.cat(alone), got[[0, -1]]):
        return f"{spec}, bfloat16: a token alone is not what it is among {MANY}"
    return ""


def _codes_differ(run: NativeRun, isa: int, format: WeightFormat, rng: torch.Generator) -> str:
    """What the kernel computes otherwise on codes: of one row, and of many."""
    spec = ExpertsSpec()
    floats, _ = _bank(spec, torch.float32, rng, stacked=False)
    every = range(E)
    w_in = QuantizedMatrices.of([quantize(floats.w_in(e)[0], format) for e in every])
    w_out = QuantizedMatrices.of([quantize(floats.w_out(e), format) for e in every])
    b_in = [[floats.b_in(e)[0] for e in every]]
    bank = QuantizedExpertWeights([w_in], w_out, b_in, [floats.b_out(e) for e in every])
    return next(filter(None, (_differs(run, isa, bank, spec, *_call(T, torch.float32, rng)) for T in (1, 11))), "")


def _rounded_rows_differ(run: NativeRun, isa: int, format: WeightFormat, rng: torch.Generator) -> str:
    """What the kernel computes otherwise where rows are rounded to 8 bits.

    The numbers are such that each sum of a first product is exact in any order: what is rounded then is the same to the
    last bit, and comes to the same side of the middle between two steps.
    """
    w_in, w_out = (
        QuantizedMatrices.of([dyadic(*size, format, rng) for _ in range(E)]) for size in ((2 * I, H), (H, I))
    )
    bank = QuantizedExpertWeights([w_in], w_out).reading("int8")
    for T in (1, 11):
        _, ids, weights = _call(T, torch.float32, rng)
        x = torch.randint(-STEPS, STEPS + 1, (T, H), generator=rng) / 32
        x[:, ::ROW_BLOCK] = STEPS / 32
        if found := _differs(run, isa, bank, ExpertsSpec(activation="relu"), x, ids, weights):
            return found
    return ""


def dyadic(N: int, K: int, format: WeightFormat, rng: torch.Generator) -> QuantizedWeight:
    """Any codes, with powers of two as their scales."""
    low, high = (-128, 128) if format.codes == "int8" else (0, 256)
    codes = torch.randint(low, high, format.code_shape((N, K)), generator=rng).to(format.code_dtype)
    blocks = format.scale_shape((N, K))
    scales = (2.0 ** torch.randint(-9, -6, blocks, generator=rng)).to(format.scale_dtype)
    zeros = None if format.symmetric else torch.randint(0, 16, blocks, generator=rng).to(format.code_dtype)
    return QuantizedWeight(codes, scales, zeros, format, (N, K))


def _differs(
    run: NativeRun, isa: int, bank: QuantizedExpertWeights, spec: ExpertsSpec, x: torch.Tensor, ids: torch.Tensor,
    weights: torch.Tensor,
) -> str:  # fmt: skip
    """How far the kernel is from the reference in float32, in words; "" where it is near."""
    want = experts_reference(x, ids, weights, bank, spec)
    try:
        far = (call(run, x, ids, weights, bank, spec, isa) - want).abs().max().item()
    except Unfit as err:
        return f"{bank.format}: {err}"
    near = far <= 16 * torch.finfo(torch.float32).eps * (want.abs().max().item() + 1)
    return "" if near else f"{bank.format}, {len(x)} rows: {far:.1e} apart"


def _call(T: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and routing weights of T tokens."""
    x = torch.randn(T, H, generator=rng).to(dtype)
    ids = torch.randint(-1, E + 1, (T, K), generator=rng)
    ids[0] = 0
    return x, ids, torch.rand(T, K, generator=rng).to(dtype)


def _bank(spec: ExpertsSpec, dtype: torch.dtype, rng: torch.Generator, stacked: bool) -> tuple[ExpertWeights, int]:
    def matrix(out: int, into: int, layout: str) -> torch.Tensor:
        w: torch.Tensor = (torch.randn(E, out, into, generator=rng) / into**0.5).to(dtype)
        return w if layout == "oi" else w.transpose(1, 2).contiguous()

    widths = {"plain": [I], "separate": [I, I]}.get(spec.rows, [2 * I])
    w_in, w_out = [matrix(n, H, spec.w_in_layout) for n in widths], matrix(H, I, spec.w_out_layout)
    b_in, b_out = (
        [torch.randn(E, n, generator=rng).to(dtype) for n in widths],
        torch.randn(E, H, generator=rng).to(dtype),
    )
    norm = (1 + torch.randn(E, H, generator=rng) / 4).to(dtype) if spec.out_norm_eps is not None else None
    if stacked:
        return StackedExpertWeights(w_in, w_out, b_in, b_out, norm), H
    each = [list(w) for w in w_in], list(w_out), [list(b) for b in b_in], list(b_out)
    return ListExpertWeights(*each, None if norm is None else list(norm)), H
