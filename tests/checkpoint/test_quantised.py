"""A quantised directory as the model: read by moeopt's own readers, its experts on the codes of the files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 has no experts that are put together", allow_module_level=True)

import moeopt  # noqa: E402
from moeopt.checkpoint import preflight as preflights  # noqa: E402
from moeopt.checkpoint.directory import CheckpointDirectory  # noqa: E402
from moeopt.checkpoint.expanded import as_its_floats, expanded  # noqa: E402
from moeopt.checkpoint.kept_weights import _key as key_of  # noqa: E402
from moeopt.checkpoint.stream import streamed  # noqa: E402
from moeopt.checkpoint.structure import structure_of  # noqa: E402
from moeopt.cli import main  # noqa: E402
from moeopt.errors import CheckpointError, UsageError  # noqa: E402
from moeopt.options import Options  # noqa: E402
from tests.checkpoint.families import write  # noqa: E402
from tests.published import layouts  # noqa: E402

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
MXFP4 = {"quant_method": "mxfp4"}
INT4 = CT | {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
KINDS = {
    "fp8": (layouts.fp8_block, FP8),
    "int4": (lambda n, N, K, seed: layouts.pack_quantized(n, N, K, 4, 32, seed=seed), INT4),
    "gptq": (lambda n, N, K, seed: layouts.gptq(n, N, K, 4, 32, seed=seed), GPTQ),
    "awq": (lambda n, N, K, seed: layouts.awq(n, N, K, 32, seed=seed), AWQ),
    "nf4": (
        lambda n, N, K, seed: layouts.nf4(n, N, K, nested=256, seed=seed),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
}
READ = KINDS | {
    "desc_act": (
        lambda n, N, K, seed: layouts.gptq(n, N, K, 4, 32, seed=seed, order=np.arange(K) * 7 % K // 32),
        GPTQ | {"desc_act": True},
    )
}
INPUTS = {"input_ids": torch.arange(12).reshape(2, 6)}


def quantised(path, kind):
    """Write a directory with experts of ``kind``; the exact weights of matrices apart, by the name of the floats."""
    exact = {}
    if kind == "mxfp4":
        write("gpt_oss", path, hidden_size=64, intermediate_size=32)
    else:
        write("qwen3", path, hidden_size=64, moe_intermediate_size=192 if kind == "fp8" else 64)
    pack, config = READ.get(kind, (None, MXFP4))
    tensors = {}
    for seed, (name, tensor) in enumerate(load_file(path / "model.safetensors").items()):
        packed = None
        if kind == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed, _ = layouts.mxfp4(name, tensor.shape[0], tensor.shape[2], tensor.shape[1], seed=seed)
            packed[f"{name}_scales"].clamp_(max=122)
        elif kind != "mxfp4" and (".experts." in name or (kind == "fp8" and "proj" in name)):
            packed, exact[name] = pack(name.removesuffix(".weight"), *tensor.shape, seed=seed)
        tensors |= packed or {name: tensor}
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    words = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(words | {"quantization_config": config}))
    return exact


def codes(opt):
    return {name: b for name, b in opt.model.named_buffers() if "moeopt_experts" in name}


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", [*KINDS, "mxfp4"])
def test_the_experts_have_the_codes_of_the_files(tmp_path, kind):
    """FP8 has blocks that are partial at both edges, which other loaders take for smaller whole ones."""
    quantised(tmp_path / "model", kind)
    opt = moeopt.optimize(tmp_path / "model", quantize="checkpoint", verify="fast")
    assert [b.reason for b in opt.report.blocks] == ["", ""]
    assert opt.certificate.passed and opt.certificate.equivalent
    assert any("have the codes of the checkpoint" in n and "the same to the bit" in n for n in opt.report.notes)
    assert any("times the file" in n for n in opt.report.notes)
    assert codes(opt) and not any("experts" in n and "bias" not in n for n, _ in opt.model.named_parameters())


@pytest.mark.parametrize("kind", READ)
def test_floats_are_what_the_codes_stand_for(tmp_path, kind):
    exact = {n: torch.from_numpy(w) for n, w in quantised(tmp_path / "model", kind).items()}
    with streamed(tmp_path / "model", Options(verify="off")) as source:
        held = dict(source.model.named_parameters())
        assert not hasattr(source.model.config, "quantization_config")
        for layer in range(2):
            at = f"model.layers.{layer}.mlp.experts"
            for e in range(4):
                gate, up, down = (exact[f"{at}.{e}.{part}_proj.weight"].float() for part in ("gate", "up", "down"))
                assert torch.equal(held[f"{at}.gate_up_proj"][e], torch.cat([gate, up]))
                assert torch.equal(held[f"{at}.down_proj"][e], down)
        if kind == "fp8":
            name = "model.layers.1.self_attn.q_proj.weight"
            assert torch.equal(held[name], exact[name].float())


def test_without_a_word_the_experts_are_floats_and_the_report_says_so(tmp_path):
    quantised(tmp_path / "model", "fp8")
    opt = moeopt.optimize(tmp_path / "model", verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"] * 2 and not codes(opt)
    assert any("checkpoint fp8, experts held as float32, 4 times the file" in n for n in opt.report.notes)
    assert any("config.json has activation_scheme 'dynamic': kernels that follow" in n for n in opt.report.notes)


@pytest.mark.parametrize("kind", [pytest.param("int4", marks=pytest.mark.nightly), "mxfp4"])
def test_a_bundle_holds_codes_and_no_float_of_an_expert(tmp_path, kind):
    quantised(tmp_path / "model", kind)
    opt = moeopt.optimize(tmp_path / "model", quantize="checkpoint", out=tmp_path / "b", verify="fast")
    stored = load_file(tmp_path / "b" / "weights.safetensors")
    floats = sum(t.numel() for t in stored.values() if t.is_floating_point())
    others = sum(p.numel() for p in opt.model.parameters())
    assert floats < others + sum(t.numel() for n, t in codes(opt).items() if n.endswith("scales")) + 100
    with torch.no_grad():
        assert torch.equal(moeopt.load(tmp_path / "b")(**INPUTS).logits, opt(**INPUTS).logits)
    assert moeopt.verify(tmp_path / "b").passed
    assert {p.name for p in tmp_path.iterdir()} == {"model", "b"}


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_explain_reads_one_layer_and_binds_its_codes(tmp_path, kind):
    quantised(tmp_path / "model", kind)
    report = moeopt.explain(tmp_path / "model", quantize="checkpoint")
    assert [b.reason for b in report.blocks] == ["", ""]
    assert any("1 of 2 layers were read" in n for n in report.notes)


def test_an_engine_of_onnx_runtime(tmp_path):
    """GPT-OSS has its matrices transposed, and biases."""
    quantised(tmp_path / "model", "mxfp4")
    opt = moeopt.optimize(tmp_path / "model", backend="onnxruntime", quantize="checkpoint", verify="fast")
    assert [b.reason for b in opt.report.blocks] == ["", ""] and opt.certificate.equivalent


def test_the_command(tmp_path, capsys):
    quantised(tmp_path / "model", "gptq")
    given = ["optimize", str(tmp_path / "model"), "--quantize", "checkpoint", "--out", str(tmp_path / "b"), "--quiet"]
    given += ["--verify", "fast"]
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 0
    assert "have the codes of the checkpoint" in " ".join(capsys.readouterr().out.split())
    assert moeopt.verify(tmp_path / "b").passed


def test_a_form_that_is_not_read_is_named(tmp_path):
    quantised(tmp_path / "model", "gptq")
    with_config(tmp_path / "model", GPTQ | {"checkpoint_format": "marlin"})
    with pytest.raises(UsageError) as err:
        moeopt.optimize(tmp_path / "model", quantize="checkpoint")
    for text in ("is quantised (gptq), and model.layers.0.mlp.experts.0.down_proj", "'marlin'", "Load it with"):
        assert text in str(err.value)


def with_config(path, config, key="quantization_config"):
    """The directory with another quantization_config; without any where it is None."""
    words = json.loads((path / "config.json").read_text())
    words.pop("quantization_config", None)
    (path / "config.json").write_text(json.dumps(words if config is None else {**words, key: config}))


def test_transforms_at_each_call_are_refused(tmp_path):
    quantised(tmp_path, "int4")
    turn = {"R4": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}
    with_config(tmp_path, INT4 | {"transform_config": {"config_groups": turn}})
    with pytest.raises(
        UsageError, match=r"with transforms of activations .* R4 \(input\) of transform_config; its weigh"
    ):
        moeopt.optimize(tmp_path)
    turn["R4"]["apply"][0]["location"] = "weight_input"  # is in the weights
    with_config(tmp_path, INT4 | {"transform_config": {"config_groups": turn}})
    assert moeopt.explain(tmp_path).blocks


def test_codes_of_which_no_config_says_how_they_are_read(tmp_path):
    quantised(tmp_path, "int4")
    with_config(tmp_path, None)
    with pytest.raises(
        CheckpointError, match=r"down_proj.weight_packed holds codes of a quantised model, and config.js"
    ):
        moeopt.optimize(tmp_path)
    with_config(tmp_path, INT4, "compression_config")  # as early files have it
    assert moeopt.explain(tmp_path).blocks


def test_too_little_disk_for_floats_is_said_before_anything_is_read(tmp_path, monkeypatch):
    quantised(tmp_path / "model", "int4")
    monkeypatch.setattr(preflights, "_free_disk", lambda out: 1000)
    with pytest.raises(
        UsageError, match=r"stands for 0.[0-9]* MB of floats, .* set TMPDIR to a folder .* or give out="
    ):
        moeopt.optimize(tmp_path / "model", quantize="checkpoint")


def test_what_is_done_under_another_config_is_not_taken(tmp_path):
    """Who mends how codes are read gets other floats, also where an earlier run was killed; so do other scales."""
    quantised(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("scales")}
    where = dict.fromkeys(tensors, "codes.safetensors") | dict.fromkeys(scales, "scales.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    save_file(tensors, tmp_path / "codes.safetensors")
    save_file(scales, tmp_path / "scales.safetensors")

    def key():
        options = Options()
        structure = structure_of(tmp_path, None, False, None)
        directory = expanded(CheckpointDirectory(tmp_path), structure.model, None)
        as_its_floats(structure.model.config)
        return key_of(directory, structure, options, "torch", None)

    found = [key(), key()]
    words = json.loads((tmp_path / "config.json").read_text())
    words["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "config.json").write_text(json.dumps(words))
    found.append(key())
    save_file({name: 2 * tensor for name, tensor in scales.items()}, tmp_path / "scales.safetensors")
    found.append(key())
    assert found[0] == found[1] != found[2] != found[3]
