"""``experts_implementation="moeopt"`` equals the library's own implementations, or is the library's own."""

import sys

import pytest
import torch

from moeopt.backends.torch import transformers_adapter as adapter
from moeopt.compat import OBJECTS_ARE_CONSTANTS
from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec

pytest.importorskip("transformers.integrations.moe", reason="transformers 5 is not installed")

E, K, H, I = 6, 3, 16, 8


def experts_module(name, dtype, **config):
    import importlib

    module_name, class_name, config_name = {
        "mixtral": ("mixtral", "MixtralExperts", "MixtralConfig"),
        "gpt_oss": ("gpt_oss", "GptOssExperts", "GptOssConfig"),
        "nemotron_h": ("nemotron_h", "NemotronHExperts", "NemotronHConfig"),
        "deepseek_v4": ("deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config"),
        "aria": ("aria", "AriaExperts", "AriaTextConfig"),
        "muse_spark": ("muse_spark", "MuseSparkExperts", "MuseSparkTextConfig"),
    }[name]
    modeling = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
    config_class = getattr(importlib.import_module(f"transformers.models.{module_name}"), config_name)
    sizes = dict(hidden_size=H, intermediate_size=I, moe_intermediate_size=I, num_local_experts=E, n_routed_experts=E)
    made = config_class(**{**sizes, "moe_num_experts": E, **config})
    module = getattr(modeling, class_name)(made).to(dtype).eval()
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.detach().copy_(torch.randn(p.shape, generator=g) / 2)
    return module


def run(module, implementation, T=5, dtype=None):
    module.config._experts_implementation = implementation
    weight = next(p for n, p in module.named_parameters() if n in ("gate_up_proj", "up_proj"))
    inputs = weight.shape[1] if module.is_transposed else weight.shape[2]
    g = torch.Generator().manual_seed(T)
    x = (torch.randn(T, inputs, generator=g) * 3).to(weight.dtype)
    weights, ids = torch.rand(T, module.num_experts, generator=g).topk(K)
    with torch.no_grad():
        return module(x, ids, weights.to(dtype or weight.dtype))


@pytest.fixture(autouse=True)
def registered():
    adapter.register()


RECOGNISED = [
    ("mixtral", {}, ExpertsSpec()),
    ("mixtral", {"hidden_act": "gelu"}, ExpertsSpec(activation="gelu")),
    ("mixtral", {"hidden_act": "relu"}, ExpertsSpec(activation="relu")),
    ("nemotron_h", {}, ExpertsSpec(rows="plain", activation="relu2")),
    (
        "gpt_oss",
        {},
        ExpertsSpec(
            rows="interleaved",
            w_in_layout="io",
            w_out_layout="io",
            activation="swish",
            alpha=1.702,
            gate_max=7.0,
            up_min=-7.0,
            up_max=7.0,
            up_offset=1.0,
        ),
    ),
    ("deepseek_v4", {"swiglu_limit": 2.5}, ExpertsSpec(gate_max=2.5, up_min=-2.5, up_max=2.5)),
    ("aria", {"num_attention_heads": 4, "num_key_value_heads": 4}, ExpertsSpec(w_in_layout="io", w_out_layout="io")),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("name", "config", "spec"), RECOGNISED)
def test_recognised_and_equal(name, config, spec, dtype):
    module = experts_module(name, dtype, **config)
    if name == "aria" and not hasattr(module, "_apply_gate"):
        pytest.skip("Aria takes part in the experts interface of newer transformers only")
    text, reason = adapter.plan(module)
    assert text is not None, reason
    got = ExpertsSpec.decode(text)
    assert (got.rows, got.activation, got.w_in_layout, got.gate_max, got.up_offset) == (
        (spec.rows, spec.activation, spec.w_in_layout, spec.gate_max, spec.up_offset)
    )
    assert got.accum_dtype == ("float32" if dtype == torch.bfloat16 else None)
    for T in (1, 5, 40):
        want = run(module, "grouped_mm", T)
        # GEMMs sum in another order: a rounding per stage (three of them), relative to the largest outputs
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(run(module, "moeopt", T), want, rtol=4 * eps, atol=4 * eps * want.abs().max().item())


def test_float32_routing_weights_on_a_bfloat16_model():
    module = experts_module("mixtral", torch.bfloat16)
    want = run(module, "grouped_mm", dtype=torch.float32)
    got = run(module, "moeopt", dtype=torch.float32)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6 * want.abs().max().item())


def strange_gate(self, h):
    gate, up = h.chunk(2, dim=-1)
    return torch.sin(gate) * up


def test_an_unknown_gate_is_left_to_the_library_with_the_reason():
    module = experts_module("mixtral", torch.float32)
    module._apply_gate = strange_gate.__get__(module)
    adapter._warned.clear()
    with pytest.warns(
        UserWarning, match="MixtralExperts to transformers' grouped_mm: its gate .*strange_gate.* equals"
    ):
        got = run(module, "moeopt")
    assert torch.equal(got, run(module, "grouped_mm"))


def test_a_gate_that_cannot_be_run_is_left_too():
    module = experts_module("mixtral", torch.float32)
    module._apply_gate = lambda h: (_ for _ in ()).throw(KeyError("no table"))
    assert "could not be run on probe rows: KeyError: 'no table'" in adapter.plan(module)[1]


def test_a_norm_after_the_experts_is_left_to_the_library():
    module = experts_module("mixtral", torch.float32)
    module.has_post_expert_norm = True
    assert "norm after each expert" in adapter.plan(module)[1]


def test_quantised_weights_are_left_to_the_library():
    module = experts_module("mixtral", torch.float32)
    module.down_proj = torch.nn.Parameter(module.down_proj.detach().to(torch.int8), requires_grad=False)
    assert "down_proj is not a plain stacked float tensor (Parameter, dtype torch.int8)" in adapter.plan(module)[1]


def test_a_changed_limit_is_recognised_anew():
    module = experts_module("deepseek_v4", torch.float32, swiglu_limit=2.5)
    run(module, "moeopt")
    module.limit = 0.5
    torch.testing.assert_close(run(module, "moeopt"), run(module, "grouped_mm"), rtol=1e-5, atol=1e-4)


def test_autocast_is_the_library_s():
    module = experts_module("mixtral", torch.float32)
    adapter._warned.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        assert torch.equal(run(module, "moeopt"), run(module, "grouped_mm"))


def test_expert_parallel_sentinels_add_nothing():
    module = experts_module("mixtral", torch.float32)
    module._is_expert_parallel = True
    ids = torch.tensor([[0, E, 2], [E, E, E]])
    outputs = []
    for name in ("moeopt", "grouped_mm"):
        module.config._experts_implementation = name
        with torch.no_grad():
            outputs.append(module(torch.ones(2, H), ids, torch.ones(2, 3)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not outputs[0][1].any()


@pytest.mark.one_isa
@pytest.mark.skipif(not OBJECTS_ARE_CONSTANTS, reason="torch.compile of this torch runs the library's grouped_mm")
def test_a_whole_model_compiles_and_exports():
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    config = MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moeopt").eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
        model.set_experts_implementation("eager")
        eager = model(ids, use_cache=False).logits
        exported = program.module()(ids, use_cache=False).logits
    assert [n.target for n in program.graph.nodes].count(torch.ops.moeopt.experts.default) == 2
    for logits in (program and exported, compiled, eager):
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)  # float32, GEMMs in another order


def test_a_transformers_without_the_interface_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(UsageError, match="it came with transformers 5: pip install 'transformers>=5'"):
        adapter.register()
