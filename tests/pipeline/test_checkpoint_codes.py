"""``quantize="checkpoint"``: the codes of the files in place of the floats that a loader made of them."""

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning, UsageError
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.published.experts import joined
from moeopt.published.quantised_tensors import quantised_tensors
from moeopt.published.tensor_files import SafetensorsDirectory
from tests.pipeline.test_beside_checkpoint import FP8, INT4, Model, fill, int4, written
from tests.published import layouts

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
INT8 = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "group_size": 32}}}}
KINDS = {
    "int4": (int4, INT4),
    "int8": (lambda n, N, K, seed: layouts.pack_quantized(n, N, K, 8, 32, seed=seed), INT8),
    "gptq of 8 bits": (lambda n, N, K, seed: layouts.gptq(n, N, K, 8, 32, seed=seed), GPTQ | {"bits": 8}),
    "fp8": (layouts.fp8_block, FP8),
    "gptq": (lambda n, N, K, seed: layouts.gptq(n, N, K, 4, 32, seed=seed), GPTQ),
    "awq": (lambda n, N, K, seed: layouts.awq(n, N, K, 32, seed=seed), AWQ),
}


def made(tmp_path, kind, inner=192):
    pack, config = KINDS[kind]
    return fill(Model(tmp_path, hidden=64, inner=inner), written(tmp_path, pack, config, hidden=64, inner=inner))


def codes(model):
    return {name: b for name, b in model.named_buffers() if "moeopt_experts" in name}


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_in_the_bytes_of_the_file(tmp_path, kind):
    model, x = made(tmp_path, kind), torch.randn(5, 64)
    with torch.no_grad():
        want = model(x)
    opt = moeopt.optimize(model, x, quantize="checkpoint", verify="fast")
    assert [b.reason for b in opt.report.blocks] == ["", ""]
    assert opt.certificate.passed and opt.certificate.equivalent and not opt.certificate.quantized
    assert any("have the codes of the checkpoint" in n and "the same to the bit" in n for n in opt.report.notes)
    with torch.no_grad():
        assert (opt(x) - want).norm() < 1e-5 * want.norm()  # 8-bit codes stand for numbers of 1e4 here
    held = codes(opt.model)
    assert held and not any("experts" in n for n, _ in opt.model.named_parameters())
    size, most = sum(t.nbytes for t in held.values()), 2 * 3 * 4 * 64 * 192 * (1.2 if "8" in kind else 0.66)
    assert size < most
    again = copy.deepcopy(opt.model)
    with torch.no_grad():
        assert torch.equal(again(x), opt(x))
    opt.save(tmp_path / "bundle")
    with torch.no_grad():
        assert torch.equal(moeopt.load(tmp_path / "bundle")(x), opt(x))
    assert moeopt.verify(tmp_path / "bundle").passed
    assert model.layers[0].mlp.experts.down_proj is not None  # the original is as it was


def test_an_engine_of_onnx_runtime_holds_the_codes(tmp_path):
    model, x = made(tmp_path, "int4"), torch.randn(5, 64)
    opt = moeopt.optimize(model, x, backend="onnxruntime", quantize="checkpoint", verify="fast")
    assert [b.reason for b in opt.report.blocks] == ["", ""] and opt.certificate.equivalent
    opt.save(tmp_path / "bundle")
    with torch.no_grad():
        torch.testing.assert_close(moeopt.load(tmp_path / "bundle")(x), model(x), rtol=1e-4, atol=1e-4)
    size = sum(f.stat().st_size for f in (tmp_path / "bundle").rglob("*") if f.is_file())
    assert size < sum(p.nbytes for p in model.parameters()) / 3


def test_matrices_that_are_not_found(tmp_path):
    model, x = made(tmp_path, "int4"), torch.randn(5, 64)
    model.layers[0].mlp, model.layers[1].mlp = model.layers[1].mlp, model.layers[0].mlp
    opt = moeopt.optimize(model, x, quantize="checkpoint", verify="off")
    assert all(b.status == "declined" and "not those of its checkpoint" in b.reason for b in opt.report.blocks)


def test_a_model_of_no_checkpoint(tmp_path):
    with pytest.raises(UsageError) as err:
        moeopt.optimize(Model(tmp_path), torch.randn(5, 64), quantize="checkpoint")
    for text in ("takes the codes of the quantised checkpoint", str(tmp_path), "quantize='int8' or another format"):
        assert text in str(err.value)


def test_a_form_that_is_not_read_leaves_floats(tmp_path):
    def act_order(n, N, K, seed):
        return layouts.gptq(n, N, K, 4, 32, seed=seed, order=torch.arange(K).numpy() % 2)

    model = fill(Model(tmp_path), written(tmp_path, act_order, GPTQ))
    opt = moeopt.optimize(model, torch.randn(5, 64), quantize="checkpoint", verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"] * 2 and not codes(opt.model)
    assert any("has its columns grouped by their activations (desc_act, actorder), and" in n for n in opt.report.notes)
    assert any("checkpoint int4, experts held as float32, 6.7 times the file" in n for n in opt.report.notes)


def test_an_expert_whose_zero_points_are_all_the_plain_one_has_codes_too(tmp_path):
    def plain_in_one(n, N, K, seed):
        return layouts.gptq(n, N, K, 4, 32, seed=seed, symmetric=".1." in n or n.endswith("0.up_proj"))

    model = fill(Model(tmp_path, layers=1), written(tmp_path, plain_in_one, GPTQ, layers=1))
    opt = moeopt.optimize(model, torch.randn(5, 64), quantize="checkpoint", verify="off")
    assert codes(opt.model) and not any("experts" in n for n, _ in opt.model.named_parameters())


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("shape", [(192, 130), (200, 64), (7, 33), (256, 128)])
def test_two_matrices_as_one(tmp_path, shape, in_turn):
    """Blocks that are partial at the edge of each stay what they are."""
    tensors, exact = {}, []
    for seed, name in enumerate(("gate", "up")):
        packed, floats = layouts.fp8_block(name, *shape, seed=seed)
        tensors |= packed
        exact.append(torch.from_numpy(floats))
    save_file(tensors, tmp_path / "model.safetensors")
    found = quantised_tensors(SafetensorsDirectory(tmp_path), FP8).matrices
    one = joined([found["gate"].read(), found["up"].read()], in_turn)
    want = torch.stack(exact, 1).flatten(0, 1) if in_turn else torch.cat(exact)
    assert isinstance(one, QuantizedWeight) and torch.equal(one.dequantize(torch.float64), want)


def test_gpt_oss_as_it_lies(tmp_path):
    """Stacked, transposed, gate and up in turn, biases: MXFP4 as GPT-OSS has it."""
    H, I, E = 64, 32, 4
    tensors, exact = layouts.mxfp4("model.layers.0.mlp.experts.gate_up_proj", E, 2 * I, H)
    more, down = layouts.mxfp4("model.layers.0.mlp.experts.down_proj", E, H, I, seed=1)

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(H, E)
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.from_numpy(exact).float().transpose(1, 2).contiguous())
            self.experts.down_proj = nn.Parameter(torch.from_numpy(down).float().transpose(1, 2).contiguous())
            self.experts.gate_up_proj_bias = nn.Parameter(torch.randn(E, 2 * I))
            self.experts.down_proj_bias = nn.Parameter(torch.randn(E, H))

        def forward(self, x):
            scores, ids = self.router(x).topk(2, -1)
            w, out = scores.softmax(-1), torch.zeros_like(x)
            for e in range(E):
                t, k = torch.where(ids == e)
                gu = x[t] @ self.experts.gate_up_proj[e] + self.experts.gate_up_proj_bias[e]
                g, u = gu[:, ::2].clamp(max=7.0), gu[:, 1::2].clamp(-7.0, 7.0)
                y = (u + 1) * g * torch.sigmoid(1.702 * g) @ self.experts.down_proj[e] + self.experts.down_proj_bias[e]
                out = out.index_add(0, t, y * w[t, k, None])
            return out

    class GptOss(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.layers = SimpleNamespace(_name_or_path=str(tmp_path)), nn.ModuleList([nn.Module()])
            self.layers[0].mlp = Mlp()

        def forward(self, x):
            return self.layers[0].mlp(x)

    save_file(tensors | more, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    torch.manual_seed(0)
    x = torch.randn(6, H)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleModelWarning)  # gradients of biases are the original's
        opt = moeopt.optimize(GptOss().eval(), x, quantize="checkpoint", verify="fast")
        opt(x).sum().backward()
    assert opt.model.layers[0].mlp.experts.gate_up_proj_bias.grad.abs().sum() > 0
    assert [b.reason for b in opt.report.blocks] == [""] and opt.certificate.equivalent
    assert any("checkpoint mxfp4, experts held as float32, 7.5 times the file" in n for n in opt.report.notes)
    held = codes(opt.model)
    assert {n.rsplit("moeopt_experts_0_")[1] for n in held} == {
        "w_in_0_codes", "w_in_0_scales", "w_out_codes", "w_out_scales"
    }  # fmt: skip
    assert sum(t.nbytes for t in held.values()) == E * (2 * I * H + H * I) * 17 // 32
