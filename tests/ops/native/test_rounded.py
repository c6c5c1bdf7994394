"""The native kernel on rows of 8 bits: the reference's very rounding, exact sums of integers, and the stated bound."""

import dataclasses

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts_reference, reference
from moeopt.ops.native import build, dispatch
from moeopt.ops.native.selfcheck import dyadic
from moeopt.ops.native.selfcheck import specs as all_fields
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.quantized_experts import flatten as lists_of
from moeopt.ops.quantized_experts import in_float64
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.ops.rounded_rows import LEAST, ROW_BLOCK, STEPS, rounded_rows
from moeopt.ops.unfit import Unfit
from tests.ops.native.conftest import Kernel, kernel_of, other_isas
from tests.ops.native.test_codes import BUDGET, FORMATS, E, K, bank_of, call_of, eps_off

TAKEN = (
    "int8", "int8-block32", "uint8", "int4", "int4-block128", "int4-channel", "int4-asymmetric32", "int4-asymmetric128",
)  # fmt: skip
RELU = ExpertsSpec(activation="relu")  # computed to the bit alike everywhere, so what is rounded next is the same
NEAR = 5e-4  # of a step: so near to the middle between two, a float32 sum decides which it is
SIZES = [(33, 24), (80, 37), (1100, 136), (1120, 160), (2080, 64)]


@pytest.fixture(params=other_isas("avx512_vnni"))
def kernel(request, whole_library):
    """With AVX-VNNI too, whose own code is here and nowhere else."""
    return kernel_of(request, whole_library)


def exact_bank(format, H, I, seed=0, spec=RELU):
    """Sums of its first products are exact in float32 on the rows of :func:`exact_rows`, if H is not too large."""
    rng = torch.Generator().manual_seed(seed)
    rows = I if spec.rows == "plain" else 2 * I
    w_in, w_out = (QuantizedMatrices.of([dyadic(n, k, format, rng) for _ in range(E)]) for n, k in ((rows, H), (H, I)))
    return QuantizedExpertWeights([w_in], w_out).reading("int8")


def exact_rows(T, H, seed=1):
    """Whole numbers whose step is a power of two; short rows of them where H is large."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-STEPS, STEPS + 1, (T, H), generator=rng) * (torch.rand(T, H, generator=rng) < 32 / H)
    x[:, ::ROW_BLOCK] = STEPS * torch.randint(-1, 2, (T, -(-H // ROW_BLOCK)), generator=rng).sign()
    return x.float() / 32


def routed(T, seed=2):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E + 1, (T, K), generator=rng)
    ids[0] = 0
    return ids, torch.rand(T, K, generator=rng)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(("H", "I"), SIZES)
def test_equals_the_reference(kernel, name, H, I):
    """One row, a few (W where it lies), many (W turned); one block, some, and more than are multiplied at once."""
    bank = exact_bank(FORMATS[name], H, I)
    for T in (1, 2, 5, 40):
        args = exact_rows(T, H), *routed(T), bank, RELU
        assert eps_off(kernel(*args), experts_reference(*args), RELU, torch.float32) <= BUDGET, T


def between_two_steps(args, I):
    """How near a hidden number comes to the middle between two steps, in steps."""
    seen, honest = [], reference.rounded_rows

    def watched(x, dtype):
        if x.shape[-1] == I:
            wide = torch.nn.functional.pad(x.double(), (0, -I % ROW_BLOCK)).unflatten(-1, (-1, ROW_BLOCK))
            seen.append((wide / (wide.abs().amax(-1, keepdim=True) / STEPS)).nan_to_num().frac().abs().sub(0.5).abs())
        return honest(x, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "rounded_rows", watched)
        want = experts_reference(*args)
    return want, min((float(one.min()) for one in seen if one.numel()), default=1.0)


@pytest.mark.parametrize("name", ["int8", "int4", "int4-asymmetric32"])
def test_each_field_of_the_spec(kernel, name):
    for number, spec in enumerate(all_fields()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            bank = bank_of(spec, FORMATS[name], 40, 24, torch.float32).reading("int8")
            for seed in range(40):
                args = call_of(bank, spec, 1 + number % 3, 40, dtype, seed)
                want, near = between_two_steps(args, 24)
                if near > NEAR:
                    break
            else:
                pytest.fail("no numbers were found that are rounded alike")
            assert eps_off(kernel(*args), want, spec, dtype) <= BUDGET, spec


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(("H", "I"), [(1100, 136), (1120, 160)])
def test_a_row_s_bits_are_the_same_beside_any_number_of_rows(kernel, name, H, I):
    """Some rows are multiplied by W where it lies, and some by W turned: in one order of the sum."""
    spec, rng = ExpertsSpec(), torch.Generator().manual_seed(2)
    bank = bank_of(spec, FORMATS[name], H, I, torch.float32).reading("int8")
    x, ids, weights = torch.randn(90, H, generator=rng), torch.ones(90, 1, dtype=torch.int64), torch.ones(90, 1)
    whole = kernel(x, ids, weights, bank, spec)
    for M in (*range(1, 30), 64, 65):
        assert torch.equal(kernel(x[:M], ids[:M], weights[:M], bank, spec), whole[:M]), M


def test_a_token_s_bits_depend_on_no_neighbour_and_on_no_thread(kernel):
    spec = ExpertsSpec()
    bank = bank_of(spec, FORMATS["int4"], 1120, 160, torch.float32).reading("int8")
    x, ids, weights, _, _ = call_of(bank, spec, 90, 1120, torch.float32)
    ids = ids.clamp(0, E - 1)
    whole = kernel(x, ids, weights, bank, spec)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernel(x[order], ids[order], weights[order], bank, spec), whole[order])
    for t in (0, 7, 89):
        row = slice(t, t + 1)
        assert torch.equal(kernel(x[row], ids[row], weights[row], bank, spec), whole[row])
    for threads in range(2, 9):
        assert torch.equal(kernel(x, ids, weights, bank, spec, threads=threads), whole), threads


@pytest.mark.parametrize("name", TAKEN)
def test_sums_are_the_same_to_the_bit_with_every_instruction_set(whole_library, name):
    """Integers are exact and each block's sum is scaled alike: AVX2 adds pairs of products, VNNI fours.

    Of a few rows and of many, in lines of 64 bytes and in what a row has behind its last whole one.
    """
    vectors = [Kernel(whole_library, isa) for isa in build.isas_here() if isa != "generic"]
    if len(vectors) < 2:
        pytest.skip("this CPU has no two of them")
    for T in (1, 3, 10, 40):
        args = torch.randn(T, 1100), *routed(T), exact_bank(FORMATS[name], 1100, 136), RELU
        first, *others = [kernel(*args) for kernel in vectors]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("T", [1, 9])
def test_the_largest_codes_saturate_nowhere(kernel, name, T):
    """Every code at one end and every number of a row at the other: pairs of products go up to 32 512."""
    format, H, I = FORMATS[name], 64, 32
    ends = (-128, 127) if format.codes == "int8" else (0, 255)
    spec = ExpertsSpec(rows="plain", activation="identity")
    for code in ends:
        for sign in (1.0, -1.0):

            def matrix(n, k, code=code):
                blocks = format.scale_shape((n, k))
                codes = torch.full(format.code_shape((n, k)), code).to(format.code_dtype)
                zeros = None if format.symmetric else torch.full(blocks, 15 if code == 0 else 0).to(format.code_dtype)
                return QuantizedWeight(codes, torch.ones(blocks).to(format.scale_dtype), zeros, format, (n, k))

            w_in, w_out = (QuantizedMatrices.of([matrix(n, k)] * E) for n, k in ((I, H), (H, I)))
            bank = QuantizedExpertWeights([w_in], w_out).reading("int8")
            x, ids, ones = torch.full((T, H), sign * STEPS), torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1)
            weight = float(matrix(1, 1).dequantize())
            assert torch.equal(kernel(x, ids, ones, bank, spec), torch.full((T, H), sign * STEPS * weight**2 * H * I))


@pytest.mark.parametrize("name", ["int8", "int4", "int4-asymmetric32"])
def test_rows_of_a_weight_may_lie_at_one_place(kernel, name):
    format = FORMATS[name]

    def matrix(n, k):
        one = dyadic(1, k, format, torch.Generator().manual_seed(n))
        parts = [None if t is None else t.expand(n, -1) for t in (one.codes, one.scales, one.zeros)]
        return QuantizedWeight(*parts, format, (n, k))

    bank = [QuantizedMatrices.of([matrix(*size)] * E) for size in ((96, 64), (64, 48))]
    bank = QuantizedExpertWeights(bank[:1], bank[1]).reading("int8")
    for T in (1, 20):
        args = exact_rows(T, 64), *routed(T), bank, RELU
        assert eps_off(kernel(*args), experts_reference(*args), RELU, torch.float32) <= BUDGET


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4", "int4-asymmetric32"])
def test_a_row_that_is_no_numbers_gives_none_and_stays_alone(kernel, name, bad):
    bank = bank_of(ExpertsSpec(), FORMATS[name], 100, 40, torch.float32).reading("int8")
    for T in (3, 40):
        x, ids, weights, _, spec = call_of(bank, ExpertsSpec(), T, 100, torch.float32)
        ids = ids.clamp(0, E - 1)
        clean = kernel(x, ids, weights, bank, spec)
        x[1, 70] = bad
        got = kernel(x, ids, weights, bank, spec)
        others = [t for t in range(T) if t != 1]
        assert torch.equal(got[others], clean[others])
        assert got[1].isnan().all() and experts_reference(x, ids, weights, bank, spec)[1].isnan().all()


def test_numbers_of_every_size(kernel):
    """Down to the least step, below which a block reads as zeros, and up to the largest float32."""
    spec = ExpertsSpec(rows="plain", activation="identity")
    bank = exact_bank(FORMATS["int8"], 64, 32, spec=spec)
    for largest in (LEAST, LEAST * 0.99, 2.0**-149, 0.0, -0.0, 2.0**-60, 2.0**100):
        args = exact_rows(3, 64) / exact_rows(3, 64).abs().max() * largest, *routed(3), bank, spec
        want = experts_reference(*args)
        got = kernel(*args)
        assert got.isfinite().all()
        assert (got - want).abs().max() <= BUDGET * torch.finfo(torch.float32).eps * want.abs().max()
        assert bool(want.any()) == (largest >= LEAST)


def product_bound(x, w, off):
    """By how much a product of rows that lie within ``off`` of ``x`` may miss x @ w.T, where they are rounded first."""
    padded = torch.nn.functional.pad(x.abs() + off, (0, -x.shape[1] % ROW_BLOCK))
    largest = padded.unflatten(1, (-1, ROW_BLOCK)).amax(-1)
    half = (largest / (2 * STEPS)).repeat_interleave(ROW_BLOCK, 1)[:, : x.shape[1]]
    return (half * (1 + 2**-20) + off) @ w.abs().T


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("T", [1, 40])
def test_the_stated_bound_against_the_float64_oracle(kernel, name, T):
    """Half a step a number, block by block, through both products: on the weights that the codes stand for."""
    H, I, spec = 300, 72, ExpertsSpec(rows="plain", activation="relu")
    rng = torch.Generator().manual_seed(4)
    bank = bank_of(spec, FORMATS[name], H, I, torch.float32)
    bank = QuantizedExpertWeights(bank.w_in_q, bank.w_out_q).reading("int8")
    x = torch.randn(T, H, generator=rng) * torch.randn(T, H, generator=rng).exp()
    ids, ones = torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1)
    formats = bank.format.text
    exact = in_float64(x, ids, ones, *lists_of(bank), dataclasses.replace(spec, compute_dtype="float64"), formats)
    w_in, w_out = bank.w_in_q[0][0].dequantize(torch.float64), bank.w_out_q[0].dequantize(torch.float64)
    hidden = (x.double() @ w_in.T).relu()
    torch.testing.assert_close(exact, hidden @ w_out.T)
    bound = product_bound(hidden, w_out, product_bound(x.double(), w_in, torch.zeros(T, H, dtype=torch.float64)))
    off = (kernel(x, ids, ones, bank, spec).double() - exact).abs()
    assert (off <= bound).all() and off.max() > 1e-3 * exact.abs().max()


def test_the_rounding_of_a_row():
    """Ties to even, the sign kept, a short last block, each block for itself."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.49] + [0.0] * 25 + [2.54, 0.01, 0.011]])
    want = torch.tensor([[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0] + [0.0] * 25 + [2.54, 0.0, 0.02]])
    torch.testing.assert_close(rounded_rows(x), want)
    assert rounded_rows(x.half(), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fp8", "the kernel reads int8, 8-bit codes about 128 and int4 with scales for each row, not fp8"),
        ("int4-block16", "rows are rounded in blocks of 32, which int4-block16 .* cuts: its scales are for 16"),
    ],
)
def test_what_it_does_not_read_the_definition_computes(kernel, name, reason):
    spec = ExpertsSpec()
    args = call_of(bank_of(spec, FORMATS[name], 64, 32, torch.float32).reading("int8"), spec, 5, 64, torch.float32)
    with pytest.raises(Unfit, match=reason):
        kernel(*args)
    torch.testing.assert_close(dispatch.quantized_on_cpu(*args), experts_reference(*args), rtol=0, atol=0)


def test_without_a_kernel_the_definition_computes(monkeypatch):
    spec = ExpertsSpec()
    bank = bank_of(spec, FORMATS["int8"], 64, 32, torch.float32)
    args = call_of(bank.reading("int8"), spec, 5, 64, torch.float32)
    monkeypatch.setattr(dispatch, "library", lambda: None)
    got = dispatch.quantized_on_cpu(*args)
    assert torch.equal(got, experts_reference(*args))
    assert not torch.equal(got, experts_reference(*args[:3], bank, spec))
