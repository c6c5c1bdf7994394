"""The native kernel on codes: the reference on the dequantised weights, whatever the format, the sizes and the rows."""

import dataclasses

import pytest
import torch

from moeopt.ir import weight_format
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import INT8_BLOCK32, UINT8_CHANNEL, WeightFormat
from moeopt.ops import experts_reference
from moeopt.ops.kernels import cpu
from moeopt.ops.native import dispatch
from moeopt.ops.native.selfcheck import specs as all_fields
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.ops.unfit import Unfit

E, K = 3, 2
FORMATS = weight_format.FORMATS | {
    f.name: f for f in (UINT8_CHANNEL, dataclasses.replace(INT8_BLOCK32, name="uint8-block32", codes="uint8"))
}
TAKEN = ("int8", "int4", "int4-block16", "int4-block128", "int4-channel", "int8-block32", "uint8-block32")
BUDGET = 16  # eps, as for floats: sums in another order, one rounding of each stage


def bank_of(spec, format, H, I, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    widths = {"plain": [I], "separate": [I, I]}.get(spec.rows, [2 * I])

    def matrices(out, into):
        return QuantizedMatrices.of(
            [quantize(torch.randn(out, into, generator=rng) / into**0.5, format) for _ in range(E)]
        )

    b_in = [[torch.randn(n, generator=rng) for _ in range(E)] for n in widths]
    b_out = [torch.randn(H, generator=rng) for _ in range(E)]
    norm = [1 + torch.randn(H, generator=rng) / 4 for _ in range(E)] if spec.out_norm_eps is not None else None
    bank = QuantizedExpertWeights([matrices(n, H) for n in widths], matrices(H, I), b_in, b_out, norm)
    compute = getattr(torch, spec.compute_dtype) if spec.compute_dtype else dtype
    return bank.handed_out((spec.w_in_layout, spec.w_out_layout), compute)


def call_of(bank, spec, T, H, dtype, seed=1):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E + 1, (T, K), generator=rng)
    ids[0] = 0
    return (
        torch.randn(T, H, generator=rng).to(dtype), ids, torch.rand(T, K, generator=rng).to(dtype), bank, spec
    )  # fmt: skip


def eps_off(got, want, spec, dtype):
    names = [spec.compute_dtype, spec.act_dtype, spec.accum_dtype, spec.out_dtype]
    eps = max(torch.finfo(d).eps for d in [dtype, *(getattr(torch, n) for n in names if n)])
    assert got.dtype == want.dtype and got.shape == want.shape
    return float((got.double() - want.double()).abs().max() / (eps * (want.double().abs().max() + 1)))


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(("H", "I"), [(33, 24), (80, 37), (1100, 136), (1120, 160)])
def test_equals_the_reference(kernel, name, H, I):
    """One row, a few (codes become floats in registers), many (in a panel); K of one and more chunks, whole blocks."""
    bank = bank_of(ExpertsSpec(), FORMATS[name], H, I, torch.float32)
    for T in (1, 2, 5, 40):
        args = call_of(bank, ExpertsSpec(), T, H, torch.float32)
        assert eps_off(kernel(*args), experts_reference(*args), ExpertsSpec(), torch.float32) <= BUDGET


@pytest.mark.parametrize(("H", "I"), [(40, 24), (96, 64)], ids=["odd", "whole blocks"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_each_field_of_the_spec(kernel, name, H, I):
    for number, spec in enumerate(all_fields()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            args = call_of(bank_of(spec, FORMATS[name], H, I, dtype), spec, 1 + number % 11, H, dtype)
            assert eps_off(kernel(*args), experts_reference(*args), spec, dtype) <= BUDGET, spec


@pytest.mark.parametrize("name", ["int8", "int4", "int4-block16"])
@pytest.mark.parametrize(("H", "I"), [(1100, 136), (1120, 160)])
def test_a_token_s_bits_do_not_depend_on_the_others(kernel, name, H, I):
    spec = ExpertsSpec()
    x, ids, weights, bank, _ = call_of(bank_of(spec, FORMATS[name], H, I, torch.float32), spec, 33, H, torch.float32)
    ids = ids.clamp(0, E - 1)
    whole = kernel(x, ids, weights, bank, spec)
    for t in (0, 7, 32):
        row = slice(t, t + 1)
        assert torch.equal(kernel(x[row], ids[row], weights[row], bank, spec), whole[row])


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(("H", "I"), [(1100, 136), (1120, 160)])
def test_a_row_s_bits_are_the_same_beside_any_number_of_rows(kernel, name, H, I):
    """Of one expert, some rows are multiplied by codes in registers and some by a panel: in one order of the sum."""
    spec, rng = ExpertsSpec(), torch.Generator().manual_seed(2)
    bank = bank_of(spec, FORMATS[name], H, I, torch.float32)
    x, ids, weights = torch.randn(13, H, generator=rng), torch.ones(13, 1, dtype=torch.int64), torch.ones(13, 1)
    whole = kernel(x, ids, weights, bank, spec)
    for M in range(1, 13):
        assert torch.equal(kernel(x[:M], ids[:M], weights[:M], bank, spec), whole[:M]), M


def matrices_of(codes, scales, kind, block):
    """int8 ``codes`` as codes of ``kind``, with ``scales`` (N, blocks) of so many columns."""
    held = [q if kind == "int8" else q.view(torch.uint8) ^ 128 for q in codes]
    format = WeightFormat("twin", kind, (1, block), str(scales[0].dtype).removeprefix("torch."))
    made = [QuantizedWeight(q, s, None, format, tuple(q.shape)) for q, s in zip(held, scales, strict=True)]
    return QuantizedMatrices.of(made)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("H", "I"), [(33, 24), (1100, 136)])
@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, None), (torch.bfloat16, 64), (torch.float16, 96)])
def test_the_same_numbers_said_otherwise_give_the_same_bits(kernel, H, I, rounds, dtype, block):
    """Codes about 128 as those about 0, -128 among them; and of rounded rows, blocks of 32 that share a scale."""
    rng, spec, sizes = torch.Generator().manual_seed(3), ExpertsSpec(), [(2 * I, H), (H, I)]
    codes = [[torch.randint(-128, 128, size, generator=rng, dtype=torch.int8) for _ in range(E)] for size in sizes]
    scales = [[torch.rand(n, -(-into // (block or into)), generator=rng) / 64 for _ in range(E)] for n, into in sizes]
    for one in (scale for part in scales for scale in part):
        one.view(-1)[:3] = torch.tensor([-0.0, 1e-39, -0.5])
    shared = [[scale.to(dtype) for scale in part] for part in scales]
    of_32 = [
        [s[:, torch.arange(0, n, 32) // (block or n)] for s in one] for one, (_, n) in zip(shared, sizes, strict=True)
    ]
    x, ids = torch.randn(13, H, generator=rng), torch.randint(0, E, (13, K), generator=rng)

    def result(kind, scales, block):
        w_in, w_out = (matrices_of(q, s, kind, block) for q, s in zip(codes, scales, strict=True))
        bank = QuantizedExpertWeights([w_in], w_out)
        return kernel(x, ids, torch.ones(13, K), bank.reading("int8") if rounds else bank, spec)

    want = result("int8", shared, block)
    assert want.isfinite().all() and torch.equal(result("uint8", shared, block), want)
    if rounds:  # of float rows, lanes are added up where a scale ends
        assert torch.equal(result("uint8", of_32, 32), want)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "int4-asymmetric32", "nf4"])
def test_what_it_does_not_read_is_left_to_torch(kernel, name):
    spec = ExpertsSpec()
    args = call_of(bank_of(spec, FORMATS[name], 64, 32, torch.float32), spec, 5, 64, torch.float32)
    with pytest.raises(Unfit, match="reads int8, 8-bit codes about 128 and symmetric int4 with scales for each row"):
        kernel(*args)
    torch.testing.assert_close(dispatch.quantized_on_cpu(*args), cpu.experts_cpu(*args), rtol=0, atol=0)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-channel"])
def test_scales_of_64_bits_are_left_to_torch(kernel, name, rounds):
    """They were read as numbers of 16."""
    spec, format = ExpertsSpec(), dataclasses.replace(FORMATS[name], scale="float64")
    bank = bank_of(spec, format, 64, 32, torch.float32)
    args = call_of(bank.reading("int8") if rounds else bank, spec, 5, 64, torch.float32)
    with pytest.raises(Unfit, match=r"codes of strides \(\d+, 1\) and scales of torch.float64"):
        kernel(*args)
    definition = experts_reference if rounds else cpu.experts_cpu
    torch.testing.assert_close(dispatch.quantized_on_cpu(*args), definition(*args), rtol=0, atol=0)
