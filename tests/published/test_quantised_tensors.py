"""Each published layout, from files that the tests pack number by number: bit for bit, mapped, and refused by name."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeopt.errors import CheckpointError
from moeopt.published.headers import files_of, stored_weights
from moeopt.published.quantised_tensors import quantised_tensors
from moeopt.published.tensor_files import SafetensorsDirectory
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
    "fp8 rows": (layouts.fp8_rows("x", 20, 33), CT, "fp8-channel"),
    "int4, groups of 32": (layouts.pack_quantized("x", 10, 96, 4, 32), grouped(32), "int4-group32"),
    "int4, groups of 128": (layouts.pack_quantized("x", 9, 256, 4, 128), grouped(128), "int4-group128"),
    "int4, a partial group": (layouts.pack_quantized("x", 9, 200, 4, 128), grouped(128), "int4-group128"),
    "int4, rows, odd": (layouts.pack_quantized("x", 7, 37, 4, None), CT, "int4"),
    "int4, zero points": (layouts.pack_quantized("x", 11, 64, 4, 32, zeros=True), grouped(32), "int4-group32"),
    "int8, rows": (layouts.pack_quantized("x", 10, 50, 8, None), grouped(None, 8), "int8"),
    "int8, groups, zero points": (
        layouts.pack_quantized("x", 10, 64, 8, 32, zeros=True, dtype=torch.float32), grouped(32, 8), "int8-group32",
    ),
    "gptq": (layouts.gptq("x", 16, 64, 4, 32), GPTQ | {"group_size": 32}, "int4-group32"),
    "gptq, symmetric": (layouts.gptq("x", 16, 64, 4, 32, symmetric=True), GPTQ | {"group_size": 32}, "int4-group32"),
    "gptq, rows": (layouts.gptq("x", 16, 64, 4, None), GPTQ | {"group_size": -1}, "int4"),
    "gptq, 8 bits": (layouts.gptq("x", 16, 64, 8, 32), GPTQ | {"group_size": 32, "bits": 8}, "int8-group32"),
    "gptq v2": (
        layouts.gptq("x", 16, 64, 4, 32, v2=True),
        GPTQ | {"group_size": 32, "checkpoint_format": "gptq_v2"}, "int4-group32",
    ),
    "awq": (layouts.awq("x", 24, 64, 32), AWQ | {"group_size": 32}, "int4-group32"),
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


def test_scales_as_powers_of_two(tmp_path):
    tensors, _ = layouts.fp8_block("x", 200, 130)
    bytes_ = torch.tensor([[120, 121], [126, 127]], dtype=torch.uint8)
    tensors["x.weight_scale_inv"] = bytes_.view(torch.float8_e8m0fnu)
    weight = found_in(tmp_path, tensors, FP8).matrices["x"].read()
    wide = torch.exp2(bytes_.double() - 127).repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
    assert torch.equal(weight.dequantize(torch.float64), tensors["x.weight"].double() * wide)


def test_floats_and_biases_are_left(tmp_path):
    tensors, _ = layouts.pack_quantized("a", 8, 32, 4, 32)
    more = {"a.bias": torch.zeros(8), "norm.weight": torch.ones(8), "gate.weight": torch.zeros(4, 8)}
    assert list(found_in(tmp_path, tensors | more, grouped(32)).matrices) == ["a"]
    assert not found_in(tmp_path, more, {}).matrices


UNREAD = {
    "a packing of nobody we know": (
        layouts.gptq("x", 8, 64, 4, 32)[0], GPTQ | {"quant_method": "auto-round"},
        "x.qweight is packed as auto-round has it; gptq and awq are read",
    ),
    "gptq for a kernel": (
        layouts.gptq("x", 8, 64, 4, 32)[0], GPTQ | {"checkpoint_format": "marlin"}, "GPTQ of the format 'marlin'"
    ),
    "gptq with bits by module": (
        layouts.gptq("x", 8, 64, 4, 32)[0], GPTQ | {"dynamic": {"+:x": {"bits": 8}}}, "bits or groups of their own"
    ),
    "desc_act": (layouts.gptq("x", 8, 64, 4, 32, order=np.arange(64) % 2)[0], GPTQ, "x.g_idx groups columns by"),
    "3 bits": (layouts.gptq("x", 8, 64, 4, 32)[0], GPTQ | {"bits": 3}, "of 3 bits"),
    "awq gemv": (layouts.awq("x", 8, 64, 32)[0], AWQ | {"version": "gemv"}, "AWQ of version 'gemv'"),
    "nvfp4": (
        {"x.weight_packed": torch.zeros(4, 8, dtype=torch.uint8), "x.weight_scale": torch.zeros(4, 1)}, CT,
        "x.weight_packed is torch.uint8 (4, 8); packed weights are read as 2-D int32",
    ),
    "e5m2": (
        {"x.weight": torch.zeros(4, 8).to(torch.float8_e5m2), "x.weight_scale": torch.ones(4, 1)}, CT,
        "x.weight is torch.float8_e5m2; 8-bit weights are read as",
    ),
    "other mxfp4": (
        {"x_blocks": torch.zeros(2, 4, 16, dtype=torch.uint8), "x_scales": torch.zeros(2, 4, dtype=torch.uint8)},
        {}, "MXFP4 is read as uint8 (experts, out, in / 32, 16)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_named(tmp_path, case):
    tensors, config, text = UNREAD[case]
    found = found_in(tmp_path, tensors, config)
    (why,) = found.unread.values()
    assert not found.matrices and text in why


DAMAGED = {
    "int4 in groups that the config does not have": (
        layouts.pack_quantized("x", 9, 200, 4, 128)[0], grouped(64), "x.weight_scale has 2 groups for 200 columns, and",
    ),
    "int4 in one group a row": (
        layouts.pack_quantized("x", 9, 64, 4, None)[0], grouped(32), "has 1 groups for 64 columns, and config.json",
    ),
    "gptq in groups that the config does not have": (
        layouts.gptq("x", 8, 64, 4, 32)[0], GPTQ | {"group_size": 16}, "x.scales has 2 groups for 64 columns, and",
    ),
    "awq in groups that the config does not have": (
        layouts.awq("x", 8, 64, 32)[0], AWQ | {"group_size": 64}, "x.scales has 2 groups for 64 columns, and",
    ),
    "fp8 in blocks that the config does not have": (
        layouts.fp8_block("x", 192, 192)[0], FP8 | {"weight_block_size": [64, 64]},
        "x.weight_scale_inv has scales for 2 x 2 blocks, and x.weight of 192 x 192 in blocks of 64 x 64 has another",
    ),
    "zero points that are in no file": (
        layouts.pack_quantized("x", 8, 64, 4, 32)[0],
        CT | {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": False}}}},
        "x.weight_zero_point is in no file, and config.json says that there is one",
    ),
    "a grid of another size": (
        {**layouts.fp8_block("x", 192, 128)[0], "x.weight_scale_inv": torch.ones(3, 1)}, FP8,
        "x.weight_scale_inv has scales for 3 x 1 blocks, and x.weight of 192 x 128 in blocks of 128 x 128 has another",
    ),
    "packed otherwise": (
        {**layouts.pack_quantized("x", 8, 64, 4, 32)[0], "x.weight_shape": torch.tensor([8, 640])}, grouped(32),
        "do not hold a 8 x 640 matrix of 4 or 8 bits",
    ),
    "groups of another size": (
        {**layouts.pack_quantized("x", 8, 64, 4, 32)[0], "x.weight_scale": torch.ones(8, 5)}, grouped(32),
        "x.weight_scale has 5 groups for 64 columns, and config.json groups of [32]",
    ),
    "scales of too few experts": (
        {**layouts.mxfp4("x", 2, 4, 32)[0], "x_scales": torch.zeros(1, 4, 1, dtype=torch.uint8)}, {},
        "x_scales is torch.uint8 (1, 4, 1), and x_blocks",
    ),
    "a zero point that is two": (
        {**layouts.gptq("x", 8, 64, 4, 32)[0], "x.qzeros": torch.full((2, 1), -1, dtype=torch.int32)}, GPTQ,
        "x.qzeros holds a zero point of 15, which stands for 16 or for 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_named(tmp_path, case):
    tensors, config, text = DAMAGED[case]
    with pytest.raises(CheckpointError) as err:
        found_in(tmp_path, tensors, config)
    assert text in str(err.value)


def test_scales_that_are_no_numbers(tmp_path):
    tensors, _ = layouts.fp8_block("x", 192, 128)
    tensors["x.weight_scale_inv"][1, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"x: the scale of block \(1, 0\) is nan"):
        found_in(tmp_path, tensors, FP8).matrices["x"].read()


def test_files_of_an_earlier_version_are_left_alone(tmp_path):
    """Loaders read what the index names; a tensor of the same name in another file is not the model's."""
    tensors, exact = layouts.fp8_block("x", 20, 15)
    save_file(tensors, tmp_path / "model-00001-of-00001.safetensors")
    save_file(layouts.fp8_block("x", 20, 15, seed=1)[0], tmp_path / "model-00001-of-00002.safetensors")
    where = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    files = SafetensorsDirectory(tmp_path)
    assert np.array_equal(quantised_tensors(files, FP8).matrices["x"].read().dequantize(torch.float64).numpy(), exact)
    assert stored_weights(tmp_path).tensors == 2
    save_file(layouts.fp8_block("x", 20, 15, seed=2)[0], tmp_path / "model.safetensors")
    assert [file.name for file in files_of(tmp_path)[0]] == ["model.safetensors"]


def test_a_file_that_is_cut_off(tmp_path):
    save_file(layouts.fp8_block("x", 20, 15)[0], tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        SafetensorsDirectory(tmp_path)


_WATCH = """
import json, sys
from pathlib import Path
import torch
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.published.headers import files_of, stored_weights
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
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, str(tmp_path)], capture_output=True, text=True, check=True
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["finite"] and told["file"] > 27e6
    assert told["held"] - told["before"] < 10e6, told  # the codes stay in the file
    assert told["peak"] - told["before"] < 48e6, told  # a quarter of the floats
