"""Rounding to nearest, and what codes and scales mean: bit for bit against numpy, at the edges and beyond them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeopt.errors import UsageError
from moeopt.ir.weight_format import (
    FLOAT16,
    FORMATS,
    FP8_BLOCK128,
    INT4_ASYMMETRIC32,
    INT4_BLOCK32,
    INT8_CHANNEL,
    MXFP4,
    NIBBLES,
    WeightFormat,
)
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_weight import TILE, QuantizedWeight
from tests.ops.dequantized import dequantized

CODED = [name for name, format in FORMATS.items() if not format.is_float]
OTHERS = [
    WeightFormat("per tensor", "e4m3", (None, None)),
    WeightFormat("float16 scales", "int8", (1, 16), "float16"),
    WeightFormat("unsigned", "uint8", (1, 32)),
    WeightFormat("signed, zero points", "int8", (1, 32), symmetric=False),
    WeightFormat("odd blocks", "uint4", (3, 5), "float16"),
    WeightFormat("high first", "uint4", (1, 32), packing="high nibble first"),
    WeightFormat("fp8, powers of two", "e4m3", (128, 128), "e8m0"),
    WeightFormat("fp4", "fp4", (1, 64), packing="high nibble first"),
]
FORMS = [*(FORMATS[name] for name in CODED), *OTHERS]
NAMES = [format.name for format in FORMS]


def random(shape, seed=0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 8).to(dtype)


def assert_exact(weight):
    want = dequantized(weight)
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), want)
    assert np.array_equal(weight.dequantize().numpy(), want.astype(np.float32))


@pytest.mark.parametrize("format", FORMS, ids=NAMES)
def test_bit_for_bit_against_numpy(format):
    for shape in ((130, 70), (4, 64), (1, 1), (3, 33)):
        weight = random(shape, seed=shape[1])
        weight[0, : shape[1] // 2] = 0  # a block of zeros
        found = quantize(weight, format)
        found.check("w")
        assert found.nbytes == format.nbytes(shape)
        assert_exact(found)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMS), st.integers(1, 40), st.integers(1, 70), st.integers(0, 9),
    st.sampled_from([1e-3, 1.0, 30.0]), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_any_shape_is_rounded_to_nearest(format, rows, columns, seed, scale, dtype):
    weight = random((rows, columns), seed, dtype) * scale
    found = quantize(weight, format)
    assert_exact(found)
    error = (found.dequantize(torch.float64) - weight.double()).abs()
    height, width = format.block[0] or rows, format.block[1] or columns
    scales = found.scales.double() if format.scale != "e8m0" else torch.exp2(found.scales.double() - 127)
    step = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    if format.codes in ("int8", "uint8", "uint4"):
        assert bool((error <= step * 0.5000001).all())
    elif format.codes == "e4m3":
        assert bool((error <= torch.maximum(weight.double().abs() / 16, step * 2.0**-10) * 1.000001).all())
    else:  # half the widest gap of the table, or what saturates beyond 6
        assert bool((error <= step * {"e2m1": 2, "nf4": 0.16, "fp4": 0.16667}[format.codes]).all())


def test_the_nearest_code_of_a_4_bit_float():
    """Every value halfway between two codes goes to the even one, as IEEE's and OCP's rounding has it."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor([[*ties, 6.0, *(-t for t in ties), -0.1, *[0.0] * 16]])
    got = quantize(row, MXFP4).dequantize()[0, :15].tolist()
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert got == [*even, 6.0, *(-e for e in even)]


def test_every_byte_of_every_kind():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    for codes in ("int8", "uint8", "e4m3", *NIBBLES):
        format = WeightFormat(codes, codes, (1, None))
        bytes_ = every[:, [b for b in range(256) if codes != "e4m3" or b & 127 != 127]]  # NaN is no weight
        K = bytes_.shape[1] * (2 if format.packed else 1)
        assert_exact(QuantizedWeight(bytes_.view(format.code_dtype), torch.tensor([[0.37]]), None, format, (1, K)))


def test_every_power_of_two():
    scales = torch.arange(255, dtype=torch.uint8).reshape(255, 1)
    weight = QuantizedWeight(torch.full((255, 16), 0x21, dtype=torch.uint8), scales, None, MXFP4, (255, 32))
    assert_exact(weight)
    with pytest.raises(UsageError, match="puts weights beyond float32"):
        weight.check("w")


@pytest.mark.parametrize("format", FORMS, ids=NAMES)
def test_zero_blocks_and_denormal_scales(format):
    zero = quantize(torch.zeros(5, 40), format)
    zero.check("w")
    assert not zero.dequantize().any()
    for size in (1e-44, 1e-38, 1e-30, 3e-6):
        tiny = random((5, 40)) * size
        found = quantize(tiny, format)
        found.check("w")
        assert_exact(found)
        assert bool(torch.isfinite(found.dequantize()).all())


def test_weights_that_no_code_means():
    for value in (float("nan"), float("inf")):
        broken = random((4, 8))
        broken[2, 3] = value
        for format in (INT8_CHANNEL, FLOAT16):
            with pytest.raises(UsageError, match="layers.3.up holds NaN"):
                quantize(broken, format, "layers.3.up")
    with pytest.raises(UsageError, match="numbers beyond float16"):
        quantize(torch.full((2, 2), 1e9), FLOAT16)
    with pytest.raises(UsageError, match="for which a float16 scale is too small"):
        quantize(torch.full((2, 2), 1e9), WeightFormat("x", "int8", scale="float16"))
    with pytest.raises(UsageError, match="takes an .out, in. float weight"):
        quantize(torch.zeros(2, 2, dtype=torch.int8), INT8_CHANNEL)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_scale_that_is_no_number_is_refused(value):
    scales = torch.full((2, 3), 0.1)
    scales[1, 2] = value
    weight = QuantizedWeight(torch.zeros(200, 300).to(torch.float8_e4m3fn), scales, None, FP8_BLOCK128, (200, 300))
    wanted = "beyond float32" if value == 3e38 else r"up_proj: the scale of block \(1, 2\) is (nan|inf)"
    with pytest.raises(UsageError, match=wanted):
        weight.check("up_proj")
    bytes_ = torch.full((1, 1), 255, dtype=torch.uint8)
    with pytest.raises(UsageError, match=r"block \(0, 0\) is nan"):
        QuantizedWeight(torch.zeros(1, 16, dtype=torch.uint8), bytes_, None, MXFP4, (1, 32)).check("w")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"codes": torch.zeros(4, 32, dtype=torch.uint8)}, "has codes of torch.uint8 (4, 33)"),
        ({"codes": torch.zeros(4, 33, dtype=torch.int8)}, "not torch.int8"),
        ({"scales": torch.zeros(4, 2, dtype=torch.bfloat16)}, "has scales of torch.bfloat16 (4, 3)"),
        ({"scales": torch.zeros(4, 3)}, "not torch.float32 (4, 3)"),
        ({"scales": None}, "has scales, and none were given"),
        ({"zeros": torch.zeros(4, 3, dtype=torch.uint8)}, "has no zeros, and some were given"),
    ],
)
def test_tensors_that_do_not_fit_the_format(change, text):
    fits = {
        "codes": torch.zeros(4, 33, dtype=torch.uint8), "scales": torch.zeros(4, 3, dtype=torch.bfloat16),
        "zeros": None, "format": INT4_BLOCK32, "shape": (4, 66),
    }  # fmt: skip
    QuantizedWeight(**fits)
    with pytest.raises(UsageError) as err:
        QuantizedWeight(**{**fits, **change})
    assert text in str(err.value)


def test_codes_that_are_views():
    found = quantize(random((6, 64)), INT4_BLOCK32)
    wide = torch.zeros(6, 80, dtype=torch.uint8)
    wide[:, 5:37] = found.codes
    flipped = torch.zeros(2, 6, dtype=torch.bfloat16)
    flipped.copy_(found.scales.t())
    other = QuantizedWeight(wide[:, 5:37], flipped.t(), None, INT4_BLOCK32, (6, 64))
    assert torch.equal(other.dequantize(), found.dequantize())


def test_no_float_copy_of_the_whole():
    """Counts what torch is asked for: no tensor of doubles beyond a few rows of blocks."""
    weight, sizes = random((4096, 512)), []
    assert weight.numel() > 4 * TILE

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.is_floating_point() and t._base is None:
                    sizes.append(t.numel())
            return out

    for format in (INT8_CHANNEL, INT4_ASYMMETRIC32, FP8_BLOCK128, MXFP4):
        with Count():
            found = quantize(weight, format)
        assert sizes and max(n for n in sizes if n != found.codes.numel() or format.codes != "e4m3") <= TILE
        sizes.clear()
        with Count():
            found.dequantize(torch.bfloat16)
        assert sorted(n for n in sizes if n > TILE) == [weight.numel()]  # the result
        sizes.clear()


def test_halves_are_rounded_once():
    found = quantize(random((40, 96)), INT8_CHANNEL)
    exact = found.dequantize(torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(found.dequantize(dtype), exact.float().to(dtype))
