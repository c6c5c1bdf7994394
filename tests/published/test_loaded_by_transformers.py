"""Quantised directories as transformers loads them on a CPU: told, compared with the file, and bound to its codes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeopt
from moeopt.ir.weight_format import FP8_BLOCK128
from moeopt.ops import quantize
from tests.published import layouts

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers loads quantised checkpoints with accelerate")

SIZES = dict(
    vocab_size=128, num_hidden_layers=2, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1,
    pad_token_id=0, eos_token_id=1,
)  # fmt: skip
INPUTS = {"input_ids": torch.arange(12).reshape(2, 6)}


def rewritten(directory, pack, config):
    """The saved model's directory, with what ``pack`` makes of each tensor."""
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        tensors |= pack(name, tensor) or {name: tensor}
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(packed, directory / "model.safetensors", metadata={"format": "pt"})
    words = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(words | {"quantization_config": config}))
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def fp8(directory, inner):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SIZES, hidden_size=256, intermediate_size=256, moe_intermediate_size=inner, num_experts=4, head_dim=128
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(directory)

    def pack(name, tensor):
        if "proj" not in name:
            return None
        held = quantize(tensor, FP8_BLOCK128)
        return {name: held.codes, f"{name}_scale_inv": held.scales}

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return rewritten(directory, pack, config)


def test_fp8_in_whole_blocks(tmp_path):
    model = fp8(tmp_path, 256)
    opt = moeopt.optimize(model, INPUTS, quantize="checkpoint", verify="fast")
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["rewritten"] * 2
    assert opt.certificate.equivalent and any("checkpoint fp8, experts held as float32" in n for n in opt.report.notes)


def test_fp8_in_partial_blocks_is_certified_only_where_it_is_the_file(tmp_path):
    """192 rows: transformers 5.23 takes them as blocks of 96. Whatever a version does, wrong weights are declined."""
    model = fp8(tmp_path, 192)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    right = torch.equal(model.model.layers[0].mlp.experts.gate_up_proj[1, 192:].float(), stored[name].float() * scale)
    for block in moeopt.optimize(model, INPUTS, verify="fast").report.blocks:
        assert (block.status == "rewritten") == right
        assert right or ("weights are not those of its checkpoint" in block.reason and "192" in block.reason)


def test_mxfp4_of_gpt_oss(tmp_path):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SIZES, hidden_size=64, intermediate_size=64, num_local_experts=4, head_dim=16, sliding_window=16
    )
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path)

    def pack(name, tensor):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        packed, _ = layouts.mxfp4(name, tensor.shape[0], tensor.shape[2], tensor.shape[1])
        return packed | {f"{name}_scales": packed[f"{name}_scales"].clamp(max=122)}

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    model = rewritten(tmp_path, pack, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    opt = moeopt.optimize(model, INPUTS, quantize="checkpoint", verify="fast")
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["rewritten"] * 2
    assert opt.certificate.equivalent
    assert any("checkpoint mxfp4, experts held as float32, 7.5 times the file" in n for n in opt.report.notes)
    with torch.no_grad():
        want, got = model(**INPUTS).logits, opt(**INPUTS).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
