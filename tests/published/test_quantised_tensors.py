"""Each published layout, from files that the tests pack number by number: bit for bit, mapped, and refused by name."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeopt.published.quantised_tensors import quantised_tensors
from moeopt.published.tensor_files import SafetensorsDirectory
from tests import children
from tests.published import layouts

CT = {"quant_method": "compressed-tensors"}


def grouped(size, bits=4):
    return {**CT, "config_groups": {"group_0": {"weights": {"num_bits": bits, "group_size": size}}}}


GPTQ, AWQ = {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LAYOUTS = {
    "fp8": (layouts.fp8_block("x", 256, 128), FP8, "fp8-128x128"),
    "fp8, partial rows": (layouts.fp8_block("x", 192, 128), FP8, "fp8-128x128"),
    "fp8, partial in both": (layouts.fp8_block("x", 200, 150), FP8, "fp8-128x128"),
    "fp8, smaller than a block": (layouts.fp8_block("x", 20, 15), FP8, "fp8-128x128"),
    "fp8, blocks of its own": (
        layouts.fp8_block("x", 50, 70, block=(16, 32)), {"weight_block_size": [16, 32]}, "fp8-16x32",
    ),
    "fp8, blocks as a word": (
        layouts.fp8_block("x", 192, 70, block=(96, 96)),
        {**CT, "config_groups": {"g": {"weights": {"block_structure": "96x96"}}}}, "fp8-96x96",
    ),
    "fp8 rows": (layouts.fp8_rows("x", 20, 33), CT, "fp8-channel"),
    "int4, groups of 32": (layouts.pack_quantized("x", 10, 96, 4, 32), grouped(32), "int4-group32"),
    "int4, groups of 128": (layouts.pack_quantized("x", 9, 256, 4, 128), grouped(128), "int4-group128"),
    "int4, a partial group": (layouts.pack_quantized("x", 9, 200, 4, 128), grouped(128), "int4-group128"),
    "int4, rows, odd": (layouts.pack_quantized("x", 7, 37, 4, None), CT, "int4"),
    "int4, zero points": (layouts.pack_quantized("x", 11, 64, 4, 32, zeros=True), grouped(32), "int4-group32"),
    "int4, zero points of one packed row": (
        layouts.pack_quantized("x", 8, 64, 4, 32, zeros=True), grouped(32), "int4-group32",
    ),
    "int4, actorder, zero points": (
        layouts.pack_quantized("x", 11, 64, 4, 32, zeros=True, order=np.arange(64) % 2), grouped(32), "int4-group32",
    ),
    "int8, rows": (layouts.pack_quantized("x", 10, 50, 8, None), grouped(None, 8), "int8"),
    "int8, groups, zero points": (
        layouts.pack_quantized("x", 10, 64, 8, 32, zeros=True, dtype=torch.float32), grouped(32, 8), "int8-group32",
    ),
    "gptq": (layouts.gptq("x", 16, 64, 4, 32), GPTQ | {"group_size": 32}, "int4-group32"),
    "gptq, desc_act": (
        layouts.gptq("x", 16, 64, 4, 32, order=np.arange(64) * 7 % 64 // 32),
        GPTQ | {"group_size": 32, "desc_act": True}, "int4-group32",
    ),
    "gptq, symmetric": (layouts.gptq("x", 16, 64, 4, 32, symmetric=True), GPTQ | {"group_size": 32}, "int4-group32"),
    "gptq, of a module with zero points of its own": (
        layouts.gptq("x", 16, 64, 4, 32),
        GPTQ | {"group_size": 32, "sym": True, "dynamic": {"+:x": {"sym": False}}}, "int4-group32",
    ),
    "gptq, rows": (layouts.gptq("x", 16, 64, 4, None), GPTQ | {"group_size": -1}, "int4"),
    "gptq, 8 bits": (layouts.gptq("x", 16, 64, 8, 32), GPTQ | {"group_size": 32, "bits": 8}, "int8-group32"),
    "gptq v2": (
        layouts.gptq("x", 16, 64, 4, 32, v2=True),
        GPTQ | {"group_size": 32, "checkpoint_format": "gptq_v2"}, "int4-group32",
    ),
    "awq": (layouts.awq("x", 24, 64, 32), AWQ | {"group_size": 32}, "int4-group32"),
    "nf4": (layouts.nf4("x", 10, 128), {"quant_method": "bitsandbytes"}, "nf4-block64"),
    "fp4": (layouts.nf4("x", 10, 128, kind="fp4"), {"quant_method": "bitsandbytes"}, "fp4-block64"),
    "nf4, scales of scales": (
        layouts.nf4("x", 150, 128, nested=256), {"quant_method": "bitsandbytes"}, "nf4-block64",
    ),
    "nf4, longer blocks": (layouts.nf4("x", 6, 256, 128, nested=4), {"quant_method": "bitsandbytes"}, "nf4-block128"),
    "fp8, one scale": (
        layouts.fp8_block("x", 200, 150, block=(200, 150)), FP8 | {"weight_block_size": None}, "fp8-tensor"
    ),
    "fp8, blocks that nobody states": (layouts.fp8_block("x", 200, 150), {"quant_method": "fp8"}, "fp8-128x128"),
    "gptq, groups that nobody states": (layouts.gptq("x", 16, 64, 4, 32), {"quant_method": "gptq"}, "int4-group32"),
    "gptq, modules left out": (
        layouts.gptq("x", 16, 64, 4, 32), GPTQ | {"group_size": 32, "dynamic": {"-:.*gate$": {}}}, "int4-group32"
    ),
}  # fmt: skip


def found_in(tmp_path, tensors, config):
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    return quantised_tensors(SafetensorsDirectory(tmp_path), config)


@pytest.mark.parametrize("case", LAYOUTS)
def test_bit_for_bit(tmp_path, case):
    (tensors, exact), config, name = LAYOUTS[case]
    found = found_in(tmp_path, tensors, config)
    assert list(found.matrices) == ["x"] and not found.unread
    matrix = found.matrices["x"]
    weight = matrix.read()
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), exact)
    assert np.array_equal(weight.dequantize().numpy(), exact.astype(np.float32))
    assert (matrix.shape, matrix.format.name, matrix.expert) == (exact.shape, name, None)
    assert set(matrix.tensors) <= set(tensors)
    points = case.startswith(("gptq", "awq")) and case != "gptq, symmetric"
    assert matrix.format.symmetric == (not points and "zero points" not in case)


def test_mxfp4_of_gpt_oss(tmp_path):
    tensors, exact = layouts.mxfp4("layers.0.experts.gate_up_proj", 3, 10, 96)
    found = found_in(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert list(found.matrices) == [f"layers.0.experts.gate_up_proj[{e}]" for e in range(3)]
    for e, matrix in enumerate(found.matrices.values()):
        assert np.array_equal(matrix.read().dequantize(torch.float64).numpy(), exact[e])
        assert matrix.format.bits_per_weight(matrix.shape) == 4.25


def test_a_stack_of_fp8_experts(tmp_path):
    made = [layouts.fp8_block("experts.up", 150, 130, seed=e) for e in range(2)]
    stacked = {name: torch.stack([one[0][name] for one in made]) for name in made[0][0]}
    found = found_in(tmp_path, stacked, FP8)
    for e, matrix in enumerate(found.matrices.values()):
        assert (matrix.expert, matrix.label) == (e, f"experts.up[{e}]")
        assert np.array_equal(matrix.read().dequantize(torch.float64).numpy(), made[e][1])


def test_a_stack_under_its_own_name(tmp_path):
    made = [layouts.fp8_block("up", 150, 130, seed=e) for e in range(2)]
    stacked = {name.replace(".weight", ""): torch.stack([one[0][name] for one in made]) for name in made[0][0]}
    found = found_in(tmp_path, stacked, FP8)
    for e, matrix in enumerate(found.matrices.values()):
        assert (matrix.expert, matrix.label, matrix.tensors) == (e, f"up[{e}]", ("up", "up_scale_inv"))
        assert np.array_equal(matrix.read().dequantize(torch.float64).numpy(), made[e][1])


def test_scales_as_powers_of_two(tmp_path):
    tensors, _ = layouts.fp8_block("x", 200, 130)
    bytes_ = torch.tensor([[120, 121], [126, 127]], dtype=torch.uint8)
    tensors["x.weight_scale_inv"] = bytes_.view(torch.float8_e8m0fnu)
    weight = found_in(tmp_path, tensors, FP8).matrices["x"].read()
    wide = torch.exp2(bytes_.double() - 127).repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
    assert torch.equal(weight.dequantize(torch.float64), tensors["x.weight"].double() * wide)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_4_bits_are_what_bitsandbytes_makes_of_its_own_files(tmp_path, nested, kind):
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    tensors = {f"x.weight.{name}": t for name, t in state.as_dict(packed=True).items()} | {"x.weight": codes}
    (matrix,) = found_in(tmp_path, tensors, {"quant_method": "bitsandbytes"}).matrices.values()
    assert torch.equal(matrix.read().dequantize(), functional.dequantize_4bit(codes, state))


def test_floats_and_biases_are_left(tmp_path):
    tensors, _ = layouts.pack_quantized("a", 8, 32, 4, 32)
    more = {"a.bias": torch.zeros(8), "norm.weight": torch.ones(8), "gate.weight": torch.zeros(4, 8)}
    assert list(found_in(tmp_path, tensors | more, grouped(32)).matrices) == ["a"]
    assert not found_in(tmp_path, more, {}).matrices


_WATCH = """
import json, sys
from pathlib import Path
import torch
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.published.quantised_tensors import quantised_tensors
from moeopt.published.tensor_files import SafetensorsDirectory

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

files = SafetensorsDirectory(Path(sys.argv[1]))
x, spec = torch.ones(64, 512), ExpertsSpec(rows="separate")
x @ torch.ones(512, 512)  # what the first product takes is not the bank's
before = anonymous()
found = quantised_tensors(files, {"config_groups": {"g": {"weights": {"group_size": 32, "num_bits": 4}}}})
parts = [[found.matrices[f"experts.{e}.{p}"].read() for e in range(64)] for p in ("gate", "up", "down")]
gate, up, down = map(QuantizedMatrices.of, parts)
bank = QuantizedExpertWeights([gate, up], down)
held, peak = anonymous(), 0
for turn in range(3):
    ids = torch.arange(64).roll(turn).reshape(64, 1)
    y = experts(x, ids, torch.ones(64, 1), bank, spec)
    peak = max(peak, anonymous())
finite = bool(torch.isfinite(y).all())
print(json.dumps({"before": before, "held": held, "peak": peak, "file": bank.nbytes, "finite": finite}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_bound_and_run_without_being_expanded(tmp_path):
    """64 experts, 27 MB in int4, 192 MB in float32: what is anonymous stays far below both."""
    g, tensors = torch.Generator().manual_seed(0), {}
    for e in range(64):
        for part in ("gate", "up", "down"):
            words = torch.randint(-(2**31), 2**31 - 1, (512, 64), generator=g, dtype=torch.int32)
            tensors[f"experts.{e}.{part}.weight_packed"] = words
            tensors[f"experts.{e}.{part}.weight_scale"] = torch.full((512, 16), 1e-3, dtype=torch.bfloat16)
            tensors[f"experts.{e}.{part}.weight_shape"] = torch.tensor([512, 512])
    save_file(tensors, tmp_path / "model.safetensors")
    done = children.run([sys.executable, "-c", _WATCH, str(tmp_path)], check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["finite"] and told["file"] > 27e6
    assert told["held"] - told["before"] < 10e6, told  # the codes stay in the file
    assert told["peak"] - told["before"] < 48e6, told  # a quarter of the floats


@pytest.mark.parametrize("number", [float, str])
def test_numbers_that_a_config_writes_otherwise(tmp_path, number):
    """4.0 bits ended in an error of Python, "4" in "of 4 bits; 4 or 8 are read"."""
    cases = [
        (layouts.gptq, lambda bits, size: GPTQ | {"bits": bits, "group_size": size}),
        (layouts.pack_quantized, lambda bits, size: grouped(size, bits)),
    ]
    for pack, config in cases:
        tensors, _ = pack("x", 8, 64, 4, 32)
        plain, other = (config(*map(kind, (4, 32))) for kind in (int, number))
        found = [found_in(tmp_path, tensors, one).matrices["x"].format for one in (plain, other)]
        assert found[0] == found[1]
