"""A model from a quantised checkpoint: what the report says of it, and weights that are not the file's."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moeopt
from tests.published import layouts

H, I, E, K = 64, 192, 4, 2


class Mlp(nn.Module):
    """Fused experts, as transformers holds them."""

    def __init__(self, hidden=H, inner=I):
        super().__init__()
        self.gate = nn.Linear(hidden, E, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * inner, hidden))
        self.experts.down_proj = nn.Parameter(torch.zeros(E, hidden, inner))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        w, ids = scores.topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            g, u = (x[t] @ self.experts.gate_up_proj[e].t()).chunk(2, -1)
            y = (torch.nn.functional.silu(g) * u) @ self.experts.down_proj[e].t()
            out = out.index_add(0, t, y * w[t, k, None])
        return out


class Model(nn.Module):
    def __init__(self, directory, layers=2, hidden=H, inner=I):
        super().__init__()
        self.config = SimpleNamespace(_name_or_path=str(directory))
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.layers:
            layer.proj, layer.mlp = nn.Linear(hidden, hidden, bias=False), Mlp(hidden, inner)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer.mlp(layer.proj(x))
        return x


def fill(model, weights):
    """Put (N, K) weights where a loader that expands them does."""
    with torch.no_grad():
        for name, exact in weights.items():
            w, parts = torch.from_numpy(exact), name.split(".")
            layer = model.layers[int(parts[2])]
            if "experts" not in parts:
                layer.proj.weight.copy_(w)
            elif parts[-1] == "down_proj":
                layer.mlp.experts.down_proj[int(parts[5])].copy_(w)
            else:
                half = int(parts[-1] == "up_proj")
                layer.mlp.experts.gate_up_proj[int(parts[5])].chunk(2)[half].copy_(w)
    return model.eval()


def names(layers=2, hidden=H, inner=I):
    for n in range(layers):
        for e in range(E):
            for part, shape in (
                ("gate_proj", (inner, hidden)),
                ("up_proj", (inner, hidden)),
                ("down_proj", (hidden, inner)),
            ):
                yield f"model.layers.{n}.mlp.experts.{e}.{part}", shape


def written(directory, pack, config, more=None, **sizes):
    """A checkpoint whose experts ``pack`` writes; the exact weights by name."""
    tensors, exact = dict(more or {}), {}
    for seed, (name, shape) in enumerate(names(**sizes)):
        packed, exact[name] = pack(name, *shape, seed=seed)
        tensors |= packed
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return exact


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32}}}}


def in_equal_blocks(name, exact, tensors):
    """The expansion with partial blocks taken as equal parts, as transformers 5.23 has it."""
    codes, scales = tensors[f"{name}.weight"].double(), tensors[f"{name}.weight_scale_inv"].double()
    N, K = codes.shape
    wide = scales.repeat_interleave(N // scales.shape[0], 0).repeat_interleave(K // scales.shape[1], 1)
    return (codes * wide).numpy()


def int4(name, N, K, seed):
    return layouts.pack_quantized(name, N, K, 4, 32, seed=seed)


def optimised(model, hidden=H):
    return moeopt.optimize(model, torch.randn(5, hidden), verify="fast")


def notes(opt, *words):
    return [n for n in opt.report.notes if all(w in n for w in words)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expanded_checkpoint_is_told(tmp_path, dtype):
    exact = written(tmp_path, int4, INT4)
    model = fill(Model(tmp_path), exact).to(dtype)
    opt = moeopt.optimize(model, torch.randn(5, H).to(dtype), verify="fast")
    ratio = {torch.float32: "7.1", torch.bfloat16: "3.6"}[dtype]
    assert notes(opt, f"checkpoint int4, experts held as {str(dtype)[6:]}, {ratio} times the file (")
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["rewritten"] * 2
    assert opt.certificate.passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_partial_blocks_that_were_expanded_wrongly(tmp_path, dtype):
    """192 rows in blocks of 128 were taken as two blocks of 96: nothing of that is certified."""
    exact = written(tmp_path, layouts.fp8_block, FP8)
    right = fill(Model(tmp_path), exact).to(dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    wrong = fill(Model(tmp_path), {n: in_equal_blocks(n, w, tensors) for n, w in exact.items()}).to(dtype)
    x = torch.randn(5, H).to(dtype)
    assert [b.status for b in moeopt.optimize(right, x, verify="fast").report.blocks] == ["rewritten"] * 2
    opt = moeopt.optimize(wrong, x, verify="fast")
    for block in opt.report.blocks:
        assert block.status == "declined"
        for text in (
            "its weights are not those of its checkpoint", "layers.0.mlp.experts.", "192", str(tmp_path),
            "the sizes divided by the number of scales, and the checkpoint has blocks of 128 x 128",
            'say so with model.config._name_or_path = ""',
        ):  # fmt: skip
            assert text in block.reason, text
    wrong.config._name_or_path = ""
    assert [b.reason for b in moeopt.optimize(wrong, x, verify="fast").report.blocks] == ["", ""]


def test_the_rows_of_a_projection_outside_the_experts(tmp_path):
    packed = [layouts.fp8_block(f"model.layers.{n}.proj", H, H, seed=90 + n, block=(40, 64)) for n in range(2)]
    config = {"quant_method": "fp8", "weight_block_size": [40, 64]}

    def pack(name, N, K, seed):
        return layouts.fp8_block(name, N, K, seed=seed, block=(40, 64))

    weights = written(tmp_path, pack, config, packed[0][0] | packed[1][0])
    projections = {f"model.layers.{n}.proj": packed[n][1] for n in range(2)}
    good = optimised(fill(Model(tmp_path), weights | projections))
    assert [b.status for b in good.report.blocks] == ["rewritten"] * 2
    wrong = {n: in_equal_blocks(n, w, packed[i][0]) for i, (n, w) in enumerate(projections.items())}
    bad = optimised(fill(Model(tmp_path), weights | wrong))
    assert notes(bad, "layers.0.proj.weight differs by", "of 64 x 64", "blocks of 32 x 64")
    for block in bad.report.blocks:
        assert "no block of this model is certified, for another part of it is wrong" in block.reason


def test_a_loader_that_computes_in_the_dtype_of_the_scales(tmp_path):
    """Products rounded to bfloat16, the scales' dtype, and cast to float32: the checkpoint's weights all the same."""
    exact = written(tmp_path, int4, INT4)
    rounded = {n: torch.from_numpy(w).bfloat16().double().numpy() for n, w in exact.items()}
    opt = optimised(fill(Model(tmp_path), rounded))
    assert [b.reason for b in opt.report.blocks] == ["", ""]
    again = moeopt.optimize(fill(Model(tmp_path), rounded), torch.randn(5, H), quantize="checkpoint", verify="fast")
    assert again.certificate.quantized and again.certificate.equivalent is False  # the codes are no longer those floats


def test_weights_that_were_changed_or_never_loaded(tmp_path):
    exact = written(tmp_path, int4, INT4)
    model = fill(Model(tmp_path), exact)
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj += 0.01
    reasons = [b.reason for b in optimised(model).report.blocks]
    assert all("the loader computed other weights, or they were changed since" in r for r in reasons)
    random = fill(Model(tmp_path), {n: w * 0 + 0.3 for n, w in exact.items()})
    assert all(b.status == "declined" for b in optimised(random).report.blocks)


def test_experts_that_the_quantiser_skipped(tmp_path):
    floats = {f"{name}.weight": torch.randn(shape) for name, shape in names()}
    save_file(floats, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    model = fill(Model(tmp_path), {n.removesuffix(".weight"): t.numpy() for n, t in floats.items()})
    (note,) = notes(optimised(model), "the quantiser skipped the experts (they were never quantised)")
    assert "checkpoint bitsandbytes, experts held as float32, 1.18 MB of the model's 1.21 MB" in note
    (tmp_path / "config.json").write_text("{}")
    assert not notes(optimised(model), "quantise")
    model.config.quantization_config = SimpleNamespace(to_dict=lambda: {"quant_method": "quanto"})
    assert notes(optimised(model), "skipped the experts", "checkpoint quanto")


def test_a_checkpoint_that_is_elsewhere(tmp_path):
    model = fill(Model("org/model"), {n: layouts.fp8_block(n, *s)[1] for n, s in names()})
    assert not notes(optimised(model), "checkpoint")
    model.config.quantization_config = {"quant_method": "fp8"}
    (note,) = notes(optimised(model), "checkpoint fp8, experts held as float32")
    assert "its files are not on this machine, so neither can be told" in note


def test_a_form_that_is_not_read(tmp_path):
    written(tmp_path, lambda n, N, K, seed: layouts.gptq(n, N, K, 4, 32), {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"
    })  # fmt: skip
    model = fill(Model(tmp_path), {n: layouts.fp8_block(n, *s)[1] for n, s in names()})
    assert notes(optimised(model), "(gptq) has 24 matrices in a form that is not read", "marlin", "were not compared")


def test_a_damaged_file_is_told(tmp_path):
    exact = written(tmp_path, int4, INT4)
    model = fill(Model(tmp_path), exact)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-40])
    assert notes(optimised(model), "could not be compared with those of the quantised checkpoint", "is damaged")


def test_a_name_of_the_hub_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    commit = "0" * 40
    home = tmp_path / "hub" / "models--org--tiny"
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    exact = written(home / "snapshots" / commit, int4, INT4)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = fill(Model("org/tiny"), exact)
    assert notes(optimised(model), "checkpoint int4, experts held as float32")


def test_experts_apart_and_other_names(tmp_path):
    """Separate Linears, and a model whose paths begin otherwise than the file's."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Linear(H, I, bias=False), nn.Linear(I, H, bias=False)

        def forward(self, x):
            return self.w2(torch.relu(self.w1(x)))

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(_name_or_path=str(tmp_path))
            self.gate = nn.Linear(H, E, bias=False)
            self.layers = nn.ModuleList([nn.ModuleList(Expert() for _ in range(E))])

        def forward(self, x):
            w, ids = self.gate(x).softmax(-1).topk(K, -1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.layers[0]):
                t, k = torch.where(ids == e)
                out = out.index_add(0, t, expert(x[t]) * w[t, k, None])
            return out

    model, tensors = Apart(), {}
    for e, expert in enumerate(model.layers[0]):
        for part, linear in (("w1", expert.w1), ("w2", expert.w2)):
            packed, exact = int4(f"backbone.layers.0.moe.{e}.{part}", *linear.weight.shape, seed=e)
            tensors |= packed
            linear.weight.data.copy_(torch.from_numpy(exact))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": INT4}))
    opt = optimised(model.eval())
    assert notes(opt, "checkpoint int4, experts held as float32, 7.1 times the file")
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    model.layers[0][3].w2.weight.data[5, 7] += 1
    assert [b.status for b in optimised(model).report.blocks] == ["declined"]
