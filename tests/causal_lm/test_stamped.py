"""Of the alike layers of a language model with a cache one is traced; the engine is that of a trace of every one."""

import contextlib

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers.exporters")

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralRotaryEmbedding

import moeopt
from moeopt.causal_lm import exporter
from moeopt.causal_lm.lm import export_causal_lm
from moeopt.lower.functional import traces_with
from moeopt.lower.stamps import Stamps
from tests.causal_lm.test_lm import ROUNDING, apart, followed, prompt


def built(kind, layers, **fields):
    """A model of Qwen3's layers, or of another kind's, each with weights of its own."""
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=64, **{"head_dim": 8, "num_key_value_heads": 1, **fields},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p == 1))
    return model


@pytest.fixture
def traces(monkeypatch):
    """The stamps of each trace."""
    found, during = [], Stamps.during

    @contextlib.contextmanager
    def noted(self):
        found.append(self)
        with during(self):
            yield self

    monkeypatch.setattr(Stamps, "during", noted)
    return found


def export(model):
    call = prompt(2, 7)
    return export_causal_lm(model, (), {"input_ids": call["input_ids"]}, lambda line: None)


def nodes(model):
    """The graph with its inner values numbered, and its weights by name."""
    names = {}

    def name(value):
        own = value is not None and (value.is_graph_input() or value.is_graph_output() or value.is_initializer())
        return None if value is None else names.setdefault(value, value.name if own else f"#{len(names)}")

    def held(attribute):
        return attribute.value.numpy().tobytes() if attribute.type.name == "TENSOR" else str(attribute.value)

    found = []
    for node in model.graph:
        reads, gives = [name(v) for v in node.inputs], [name(v) for v in node.outputs]
        found.append((node.domain, node.op_type, reads, gives, {k: held(a) for k, a in node.attributes.items()}))
    return found, {k: v.const_value.numpy().tobytes() for k, v in model.graph.initializers.items()}


def test_the_graph_is_that_of_a_trace_of_every_layer_of_two_kinds(traces):
    """Layers that look at a window between layers that look at all tokens are two kinds."""
    model = built("qwen3", 4, use_sliding_window=True, sliding_window=4, max_window_layers=0,
                  layer_types=["full_attention", "sliding_attention"] * 2)  # fmt: skip
    one = export(model)
    assert [len(stamps.layers) for stamps in traces] == [1]
    assert [kind.path for kind in traces[0].kinds.values()] == [f"model.layers.{n}" for n in (0, 1, 2)]
    with traces_with(each_layer=True):
        other = export(model)
    assert len(traces) == 1
    assert nodes(one.model) == nodes(other.model) and one.signature == other.signature


def test_no_trace_follows_the_first_and_the_graph_is_as_if_one_did(monkeypatch):
    """Mixtral's router renormalises the weights in place, and its masks are ``and``s of others."""
    fields = dict(num_local_experts=4, num_experts_per_tok=2)
    model = moeopt.optimize(built("mixtral", 1, **fields), {"input_ids": prompt(2, 7)["input_ids"]}, verify="off").model
    again, theirs = [], torch.export.ExportedProgram.run_decompositions

    def counted(self, *args, **options):
        again.append(self)
        return theirs(self, *args, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    one = export(model)
    assert again == []
    monkeypatch.setattr(exporter, "composites_written_out", lambda program: program)
    other = export(model)
    assert len(again) == 1 and nodes(one.model) == nodes(other.model) and one.signature == other.signature


@pytest.mark.nightly  # the home-made layers of test_carried_cache.py are a sample of the kind
def test_latent_attention_and_routers_with_a_bias_each_are_of_one_kind(traces):
    """DeepSeek-V3: its first layer is dense, the routers of the others have buffers with other values."""
    model = built(
        "deepseek_v3", 5, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        head_dim=4, num_key_value_heads=2,
    )  # fmt: skip
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(4))
    call = prompt(2, 7)
    engine = moeopt.optimize(model, {"input_ids": call["input_ids"]}, backend="onnxruntime", verify="fast")
    assert [stamps.layers for stamps in traces] == [[f"model.layers.{n}" for n in (2, 3, 4)]]
    assert apart(model, engine, call, followed(call, 1)) < ROUNDING


TURN = []


class Counted(MixtralAttention):
    """The later in the model, the larger: nothing of a layer shows that."""

    def forward(self, hidden_states, **kwargs):
        y, weights = super().forward(hidden_states, **kwargs)
        TURN.append(1)
        return y * len(TURN), weights


class Begins(MixtralRotaryEmbedding):
    def forward(self, x, position_ids):
        TURN.clear()
        return super().forward(x, position_ids)


@pytest.mark.nightly  # the home-made layers of tests/lower/test_stamps.py are of this kind
@pytest.mark.parametrize("verify", ["fast", "off"])
def test_layers_that_differ_in_what_nobody_watches(verify, traces):
    model = built("mixtral", 3, num_local_experts=2, num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Counted
    model.model.rotary_emb.__class__ = Begins
    call = prompt(2, 7)
    engine = moeopt.optimize(model, {"input_ids": call["input_ids"]}, backend="onnxruntime", verify=verify)
    assert [len(stamps.layers) for stamps in traces] == ([1, 0] if verify == "fast" else [])
    assert apart(model, engine, call, followed(call, 1)) < ROUNDING


@pytest.mark.nightly  # another cause of what the test above shows: the comparison of the engine
def test_a_stamp_with_other_weights_is_caught_by_the_comparison_of_the_engine(monkeypatch, traces):
    """Sabotage: every stamped layer reads the weights of the traced one."""
    monkeypatch.setattr("moeopt.lower.stamp_graph._pairs", lambda stamps, first, path, weights: [])
    model = built("mixtral", 3, num_local_experts=2, num_experts_per_tok=1)
    call = prompt(2, 7)
    engine = moeopt.optimize(model, {"input_ids": call["input_ids"]}, backend="onnxruntime", verify="fast")
    assert [len(stamps.layers) for stamps in traces] == [1]
    assert apart(model, engine, call, followed(call, 1)) < ROUNDING
