"""Quantised tensors that are damaged, unknown or of two versions are refused by name; nothing is guessed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeopt.errors import CheckpointError
from moeopt.published.headers import files_of, stored_weights
from moeopt.published.quantised_tensors import quantised_tensors
from moeopt.published.tensor_files import SafetensorsDirectory
from tests.published import layouts
from tests.published.test_quantised_tensors import AWQ, CT, FP8, GPTQ, found_in, grouped

BNB = {"quant_method": "bitsandbytes"}


def said_of(**other):
    """The state of ``layouts.nf4("x", 8, 64)``, but for some of it."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 64]} | other
    return {"x.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


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
    "partial blocks of nobody knows which size": (
        layouts.fp8_block("x", 192, 70)[0], CT,
        "x.weight_scale_inv has scales for 2 x 1 blocks of x.weight of 192 x 70, and config.json does not say of which",
    ),
    "a scale for each expert of a stack": (
        {"x": layouts.fp8_block("x", 4, 8)[0]["x.weight"].expand(4, 4, 8), "x_scale": torch.ones(4, 1)}, CT,
        "x_scale is (4, 1), and the stack x of (4, 4, 8) is read with scales of each expert's rows or blocks",
    ),
    "scales with more dimensions than a matrix": (
        {"x.weight": layouts.fp8_block("x", 256, 128)[0]["x.weight"], "x.weight_scale": torch.ones(2, 1, 1, 1)}, CT,
        "x.weight_scale is (2, 1, 1, 1); scales of a matrix are read as one, as rows, or as blocks",
    ),
    "3 bits": (layouts.gptq("x", 8, 64, 4, 32)[0], GPTQ | {"bits": 3}, "of 3 bits"),
    "awq gemv": (layouts.awq("x", 8, 64, 32)[0], AWQ | {"version": "gemv"}, "AWQ of version 'gemv'"),
    "int4 without its scale": (
        {k: t for k, t in layouts.pack_quantized("x", 8, 64, 4, 32)[0].items() if "scale" not in k}, CT,
        "x.weight_packed is torch.int32 (8, 8), without x.weight_scale; packed weights",
    ),
    "nvfp4": (
        {"x.weight_packed": torch.zeros(4, 8, dtype=torch.uint8), "x.weight_scale": torch.zeros(4, 1)}, CT,
        "x.weight_packed is torch.uint8 (4, 8), without x.weight_shape; packed weights are read as 2-D int32",
    ),
    "nvfp4 by its config": (
        layouts.pack_quantized("x", 8, 64, 4, 32)[0], CT | {"format": "nvfp4-pack-quantized"},
        "x.weight_packed may be of the format NVFP4, 4-bit floats with FP8 scales, that config.json names",
    ),
    "a format of one of its groups": (
        layouts.pack_quantized("x", 8, 64, 4, 32)[0], CT | {"config_groups": {"g": {"format": "marlin-24"}}},
        "x.weight_packed may be of the format 'marlin-24' that config.json names; pack-quantized is read",
    ),
    "nvfp4 of modelopt": (
        {"x.weight": torch.zeros(4, 8, dtype=torch.uint8), "x.weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn)},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "x.weight is NVFP4, two 4-bit floats in a byte with FP8",
    ),
    "mxfp4 under the name of a weight": (
        {"x.weight": torch.zeros(4, 16, dtype=torch.uint8), "x.weight_scale": torch.zeros(4, 1, dtype=torch.uint8)},
        {"quant_method": "quark"}, "x.weight is MXFP4 under the name of a weight; MXFP4 is read as ..._blocks and",
    ),
    "codebooks": (
        {"x.codes": torch.zeros(4, 8, 1, dtype=torch.int8), "x.codebooks": torch.ones(1, 256, 1, 8)},
        {"quant_method": "aqlm"}, "x.codes holds codes (torch.int8) as aqlm has them, which is not read",
    ),
    "eetq": (
        {"x.weight": torch.ones(4, 8, dtype=torch.int8), "x.weight_scales": torch.ones(8)}, {"quant_method": "eetq"},
        "x.weight holds codes (torch.int8), and x.weight_scales may be their scale; 8-bit weights are read with",
    ),
    "e5m2": (
        {"x.weight": torch.zeros(4, 8).to(torch.float8_e5m2), "x.weight_scale": torch.ones(4, 1)}, CT,
        "x.weight is torch.float8_e5m2; 8-bit weights are read as",
    ),
    "fp4 by the table of nf4": (
        {n.replace("nf4", "fp4"): t for n, t in layouts.nf4("x", 8, 64)[0].items()}, BNB,
        "x.weight.quant_map is another table than fp4's",
    ),
    "bitsandbytes' int8": (
        {"x.weight": torch.ones(4, 8, dtype=torch.int8), "x.SCB": torch.ones(4)}, BNB,
        "x.weight is of bitsandbytes' 8 bits (LLM.int8), whose products round rows of x too and take columns",
    ),
    "nf4 whose blocks go on in the next row": (
        layouts.nf4("x", 8, 96)[0], BNB, "the blocks of 64 of x.weight go over the ends of its rows of 96",
    ),
    "nf4 by another table": (
        layouts.nf4("x", 8, 64)[0] | {"x.weight.quant_map": torch.linspace(-1, 1, 16)}, BNB,
        "x.weight.quant_map is another table than nf4's",
    ),
    "a stack in nf4": (
        layouts.nf4("x", 8, 64)[0] | said_of(shape=[2, 4, 64]), BNB, "x.weight is of [2, 4, 64] in blocks of 64; matr",
    ),
    "nf4 of no size": (layouts.nf4("x", 8, 64)[0] | said_of(shape=["8", 64]), BNB, "x.weight is of ['8', 64] in"),
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


def without(tensors, name):
    return {k: t for k, t in tensors.items() if k != name}


def two(pack, **how):
    return pack("x", 8, 64, 4, 32, **how)[0] | pack("y", 8, 64, 4, 32, **how)[0]


def by_activations(groups):
    weights = {"num_bits": 4, "group_size": 32, "actorder": "dynamic"}
    return CT | {"config_groups": {str(n): {"weights": weights} for n in range(groups)}}


ORDER = np.arange(64) % 2
DAMAGED = {
    "desc_act without an order": (
        without(layouts.gptq("x", 8, 64, 4, 32, order=ORDER)[0], "x.g_idx"), GPTQ | {"desc_act": True},
        "x.g_idx is in no file, and config.json says that there is one: a file is missing, or the index that names it",
    ),
    "actorder without an order": (
        without(layouts.pack_quantized("x", 8, 64, 4, 32, order=ORDER)[0], "x.weight_g_idx"),
        CT | {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32, "actorder": "group"}}}},
        "x.weight_g_idx is in no file, and config.json says that there is one",
    ),
    "actorder by its other name, in each of two groups": (
        without(layouts.pack_quantized("x", 8, 64, 4, 32, order=ORDER)[0], "x.weight_g_idx"), by_activations(2),
        "x.weight_g_idx is in no file, and config.json says that there is one",
    ),
    "an order that was never set, or is lost": (
        without(two(layouts.pack_quantized, order=ORDER), "y.weight_g_idx"), by_activations(1),
        "fetch the files again (compressed-tensors also leaves out an order never set, as of an expert that no",
    ),
    "an order that others have": (
        without(two(layouts.gptq, order=ORDER), "y.g_idx"), GPTQ, "y.g_idx is in no file, and other matrices have one",
    ),
    "zero points that others have": (
        without(two(layouts.pack_quantized, zeros=True), "x.weight_zero_point"), CT,
        "x.weight_zero_point is in no file, and other matrices have one",
    ),
    "fp8 without its scale": (
        {"x.weight": layouts.fp8_block("x", 20, 15)[0]["x.weight"]}, FP8,
        "x.weight holds codes (torch.float8_e4m3fn), and no file has a scale for them (x.weight_scale_inv or",
    ),
    "int8 with the scale of its input alone": (
        {"x.weight": torch.zeros(4, 8, dtype=torch.int8), "x.input_scale": torch.ones(1)}, CT, "no file has a scale for"
    ),
    "int8 without its scale": ({"x.weight": torch.zeros(4, 8, dtype=torch.int8)}, CT, "no file has a scale for them"),
    "a stack without its scale": (
        {"x": layouts.fp8_block("x", 20, 15)[0]["x.weight"][None]}, FP8, "x holds codes (torch.float8_e4m3fn), and no",
    ),
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
    "zero points of another format": (
        layouts.gptq("x", 8, 64, 4, 32, symmetric=True)[0], GPTQ | {"checkpoint_format": "gptq_v2", "sym": True},
        "config.json says that zero points are all 8 (sym), and those of x.qzeros, read in the format gptq_v2, are not",
    ),
    "a column in a group that has no scale": (
        layouts.gptq("x", 8, 64, 4, 32)[0] | {"x.g_idx": torch.arange(64) // 16}, GPTQ,
        "x.g_idx has to name one of 2 groups for each of 64 columns, and does not",
    ),
    "groups of other columns": (
        layouts.gptq("x", 8, 64, 4, 32)[0] | {"x.g_idx": torch.arange(32) // 16}, GPTQ,
        "for each of 64 columns, and does",
    ),
    "a zero point that is two": (
        {**layouts.gptq("x", 8, 64, 4, 32)[0], "x.qzeros": torch.full((2, 1), -1, dtype=torch.int32)}, GPTQ,
        "x.qzeros holds a zero point of 15, which stands for 16 or for 0",
    ),
}  # fmt: skip


def test_groups_with_settings_of_their_own_need_not_be_alike(tmp_path):
    weights = [{"weights": {"num_bits": 4, "group_size": 32, "symmetric": symmetric}} for symmetric in (True, False)]
    config = CT | {"config_groups": {"a": weights[0], "b": weights[1]}}
    tensors = without(two(layouts.pack_quantized, zeros=True), "x.weight_zero_point")
    assert [m.format.symmetric for m in found_in(tmp_path, tensors, config).matrices.values()] == [True, False]


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


def test_codes_that_are_no_numbers(tmp_path):
    tensors, _ = layouts.fp8_block("x", 20, 15)
    tensors["x.weight"].view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(CheckpointError, match=r"x: the code of weight \(3, 5\) is NaN"):
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


@pytest.mark.parametrize(
    ("nested", "other", "text"),
    [
        (
            0,
            said_of(shape=[16, 64]),
            r"x.weight has 256 numbers, and x.weight of 16 x 64 in blocks of 64 needs 512: a f",
        ),
        (0, {"x.weight.absmax": torch.ones(7)}, r"x.weight.absmax has 7 numbers, and x.weight of 8 x 64 .* needs 8"),
        (0, said_of(nested_blocksize=4, nested_offset=0.5), r"x.weight.nested_absmax has 0 numbers, and .* needs 2"),
        (0, said_of(nested_blocksize=4), r"nf4 has no sizes of scales of scales"),
        (0, said_of(nested_blocksize=0, nested_offset=0.5), r"nf4 has no sizes of scales of scales"),
        (4, said_of(), r"x.weight.absmax is torch.uint8, which .*nf4 says nothing of: fetch both again"),
        (4, {"x.weight.nested_absmax": torch.ones(3)}, r"x.weight.nested_absmax has 3 numbers, and .* needs 2"),
        (4, {"x.weight.absmax": torch.ones(8)}, r"x.weight.absmax is torch.float32, which .*nf4 says nothing of"),
        (0, {"x.weight.quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)}, r"nf4 is no JSON"),
        (0, {"x.weight.quant_state.bitsandbytes__nf4": torch.tensor([123.0])}, r"nf4 is no JSON"),
        (
            0,
            {"x.weight.quant_state.bitsandbytes__nf4": torch.tensor([49], dtype=torch.uint8)},
            r"nf4 says 1, and not w",
        ),
    ],
)
def test_nf4_whose_parts_do_not_fit(tmp_path, nested, other, text):
    with pytest.raises(CheckpointError, match=text):
        for matrix in found_in(tmp_path, layouts.nf4("x", 8, 64, nested=nested)[0] | other, BNB).matrices.values():
            matrix.read()
