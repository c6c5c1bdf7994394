import copy
import json
import sys

import pytest
import torch

from tests import children

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers.exporters")

import moeopt
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.session import Session
from moeopt.causal_lm.lm import export_causal_lm, is_causal_lm
from moeopt.causal_lm.lm_graph import own_generation
from moeopt.causal_lm.runner import CausalLM
from moeopt.errors import Declined, NotEquivalentError, UsageError
from moeopt.lower.onnx.assemble import replace_sites
from moeopt.lower.onnx.export import own_outputs
from tests.families.build import FAMILIES

GREEDY = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False, no_repeat_ngram_size=2)
ROUNDING = 2e-5
"""Logits of these models are below 10 and go through two layers of float32 matmuls in another order."""

CALLS = [(1, False), (7, True)]
"""Rows of a call, and whether it has padding: never in the first row, which is alone or beside others that have."""


def exported(name, folder):
    """The original, and an engine made of a twin whose own weights are NaN by the time it runs."""
    import onnx_ir

    family = FAMILIES[name]
    original = family.build()
    twin = copy.deepcopy(original)
    optimized = moeopt.optimize(twin, family.inputs(), verify="off").model
    export = export_causal_lm(optimized, (), family.inputs(), lambda line: None)
    assert "forward" not in vars(optimized)
    plan = OrtPlan("cpu")
    replace_sites(export.model, [plan.legalize(s) for s in export.sites], plan.lowering)
    own_outputs(export.model.graph)
    onnx_ir.save(export.model, folder / "model.onnx", external_data="model.onnx.data")
    (folder / "signature.json").write_text(json.dumps(export.signature))
    with torch.no_grad():
        for model in (twin, optimized):
            for t in (*model.parameters(), *model.buffers()):
                t.fill_(float("nan")) if t.is_floating_point() else None
    return original, CausalLM(Session(folder / "model.onnx"), json.loads((folder / "signature.json").read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def pair(folder):
    return exported("qwen3_moe", folder)


def prompt(rows, length, padded=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 63, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, rows):
            mask[row, : min(length - 1, 2 * row)] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def followed(first, tokens):
    """The call after ``first`` with ``tokens`` more."""
    mask = torch.cat([first["attention_mask"], torch.ones(len(first["input_ids"]), tokens, dtype=torch.int64)], 1)
    new = prompt(len(mask), tokens, seed=1)["input_ids"]
    return {
        "input_ids": new,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:],
    }


@torch.no_grad()
def apart(original, engine, call, more):
    """How far the logits are apart at tokens that are not padding, in a first call and one that goes on from it."""
    want, got = original(**call, use_cache=True), engine(**call)
    assert type(got) is type(want)
    real = call["attention_mask"].bool()
    first = (got.logits - want.logits)[real].abs().max()
    second = engine(**more, past_key_values=got.past_key_values).logits
    want = original(**more, past_key_values=want.past_key_values).logits
    return max(first, (second - want).abs().max())


@pytest.mark.sample(2)
@pytest.mark.parametrize(("rows", "padded"), CALLS)
@pytest.mark.parametrize("length", [1, 2, 100])
def test_any_batch_any_length_and_a_past(pair, rows, padded, length):
    call = prompt(rows, length, padded)
    for tokens in (1, 3):
        assert apart(*pair, call, followed(call, tokens)) < ROUNDING


def test_the_graph_multiplies_the_cache_as_it_is(pair, folder):
    import onnx_ir
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = pair[0].config
    assert config.num_attention_heads > config.num_key_value_heads
    outputs = onnx_ir.load(folder / "model.onnx").graph.outputs
    caches = [value for value in outputs if value.name.startswith("present.")]
    readers = {use.node.op_type for value in caches for use in value.uses()}
    assert readers == {"MatMul", "FusedMatMul"}  # the second reads keys transposed
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_padding_would_show_if_the_mask_were_not_read(pair):
    _, engine = pair
    call = prompt(3, 9, padded=True)
    unmasked = engine(**{**call, "attention_mask": torch.ones_like(call["input_ids"])}).logits
    real = call["attention_mask"].bool()
    assert (engine(**call).logits - unmasked)[2][real[2]].abs().max() > 100 * ROUNDING


def test_mask_and_positions_default_as_the_models_do(pair):
    original, engine = pair
    ids = prompt(2, 6)["input_ids"]
    with torch.no_grad():
        want = original(ids)
    got = engine(ids)
    assert (got.logits - want.logits).abs().max() < ROUNDING
    assert got.past_key_values.get_seq_length() == 6
    assert engine(ids, use_cache=False).past_key_values is None
    logits, cache = engine(ids, return_dict=False)
    assert torch.equal(logits, got.logits) and cache.get_seq_length() == 6


def test_packed_sequences_are_refused_where_the_model_would_see_them(pair):
    original, engine = pair
    call = {"input_ids": prompt(1, 6)["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with pytest.raises(UsageError, match="position_ids start anew within a row: .* give each sequence a row of"):
        engine(**call, use_cache=False)
    with torch.no_grad():  # with a cache the model reads them as positions only
        want = original(**call, use_cache=True)
    assert (engine(**call, use_cache=True).logits - want.logits).abs().max() < ROUNDING


def test_logits_of_some_positions_only(pair):
    _, engine = pair
    ids = prompt(2, 6)["input_ids"]
    whole = engine(ids).logits
    torch.testing.assert_close(engine(ids, logits_to_keep=2).logits, whole[:, -2:], rtol=0, atol=ROUNDING)
    for keep in (-4, slice(1, 4), torch.tensor([False, True, False, False, True, False])):
        want = (
            whole[:, slice(4, None) if keep == -4 else keep] if not isinstance(keep, torch.Tensor) else whole[:, keep]
        )
        torch.testing.assert_close(engine(ids, logits_to_keep=keep).logits, want, rtol=0, atol=ROUNDING)
    picked = torch.tensor([1, -1])
    torch.testing.assert_close(engine(ids, logits_to_keep=picked).logits, whole[:, picked], rtol=0, atol=ROUNDING)


def test_the_cache_that_was_passed_grows(pair):
    _, engine = pair
    call = prompt(2, 5)
    cache = engine(**call).past_key_values
    more = followed(call, 2)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    listed = engine(**more, past_key_values=pairs)
    grown = engine(**more, past_key_values=cache)
    assert grown.past_key_values is cache and cache.get_seq_length() == 7
    assert isinstance(listed.past_key_values, list) and torch.equal(listed.logits, grown.logits)
    assert torch.equal(engine(**more, cache=pairs).logits, grown.logits)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 8}], ids=["greedy", "beams", "sample"]
)
def test_generates_the_same_tokens(pair, rows, how):
    original, engine = pair
    call = prompt(rows, 9, padded=True)
    del call["position_ids"]
    tokens = []
    for model in (original, engine):
        torch.manual_seed(0)
        tokens.append(model.generate(**call, **{**GREEDY, **how}))
    assert torch.equal(*tokens)


def test_streams_and_stops(pair):
    from transformers import StoppingCriteria
    from transformers.generation.streamers import BaseStreamer

    class Heard(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    class Short(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    heard = Heard()
    out = pair[1].generate(prompt(1, 9)["input_ids"], streamer=heard, stopping_criteria=[Short()], **GREEDY)
    assert out.shape == (1, 12) and heard.tokens == [*out[0].tolist(), "end"]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"labels": torch.zeros(2, 5, dtype=torch.int64)}, "labels: the engine computes no loss; take logits from it"),
        ({"inputs_embeds": torch.zeros(2, 5, 32)}, "inputs_embeds: the engine starts from token ids; pass input_ids"),
        ({"output_hidden_states": True}, "no hidden states; run the original model for them"),
        ({"output_attentions": True}, "no attention weights; run the original model for them"),
        ({"output_router_logits": True}, "no router logits; run the original model for them"),
        ({"token_type_ids": torch.zeros(2, 5)}, "token_type_ids: the engine was exported without it"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \(2, 5\): one entry for each cached and each"),
        ({"attention_mask": {"full": None}}, r"must be \(2, 5\).* not dict"),
        ({"attention_mask": torch.full((2, 5), 0.5)}, "attention_mask must hold zeros and ones"),
        ({"position_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"position_ids must be \(2, 5\), not \(2, 4\)"),
        ({"position_ids": torch.zeros(2, 5)}, "position_ids must be a tensor of whole numbers, not float32"),
        ({"position_ids": [0, 1, 2, 3, 4]}, "position_ids must be a tensor of whole numbers, not list"),
        ({"input_ids": None}, r"input_ids must be a tensor \(rows, tokens\)"),
        (
            {"input_ids": "w1 w2"},
            r"not text: give what a tokenizer makes of it, \*\*tokenizer\(text, return_tensors='pt'\)",
        ),
        ({"input_ids": ["w1"]}, "with at least one token, not text: give what a tokenizer makes of it"),
        ({"input_ids": {"input_ids": 1}}, "not a dict: give what is in it by name, with two asterisks before it"),
        ({"input_ids": [[1, 2]]}, r"not a list: give torch.tensor\(...\) of it, or return_tensors='pt' to a tokenizer"),
        ({"input_ids": torch.ones(3).long()}, r"one token, not \(3,\): give input_ids\[None\], one row"),
        ({"input_ids": torch.ones(1, 0).long()}, r"with at least one token, not \(1, 0\)$"),
        ({"input_ids": torch.ones(2, 5)}, "input_ids must be int64 or int32, not float32"),
        ({"input_ids": torch.full((2, 5), -1)}, "input_ids holds -1, and the vocabulary has 0 to 63"),
        ({"input_ids": torch.full((2, 5), 64)}, "input_ids holds 64, and the vocabulary has 0 to 63"),
        ({"logits_to_keep": torch.tensor([-6])}, "logits_to_keep = .* picks no list of positions among 5 tokens"),
        ({"logits_to_keep": "last"}, "logits_to_keep = 'last' picks no list of positions"),
        ({"past_key_values": [(None, None)] * 2}, "layer 0 has keys of nothing where"),
        (
            {"past_key_values": [(torch.zeros(2, 2, 3, 8).half(),) * 2] * 2},
            "keys in float16, and the engine's cache is",
        ),
        ({"past_key_values": object()}, "past_key_values is a object; the engine takes a DynamicCache"),
        ({"past_key_values": [(torch.zeros(2, 2, 3, 8),) * 2]}, "past_key_values has 1 layers; the model has 2"),
        ({"past_key_values": [(torch.zeros(1, 2, 3, 8),) * 2] * 2}, "pass the cache that the engine returned"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refuses_with_the_way_out(pair, extra, text):
    call = {"input_ids": prompt(2, 5)["input_ids"], **extra}
    with pytest.raises(UsageError, match=text):
        pair[1](**call)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (("w1 w2",), {}, "not text: give what a tokenizer makes of it"),
        (({"input_ids": 1},), {}, "not a dict: give what is in it by name"),
        ((), {"inputs": [[1, 2]]}, r"not a list: give torch.tensor\(...\) of it"),
        ((), {"input_ids": torch.ones(3).long()}, r"give input_ids\[None\], one row"),
    ],
)
def test_generate_is_given_ids(pair, args, kwargs, text):
    with pytest.raises(UsageError, match=f"input_ids must be a tensor .*{text}"):
        pair[1].generate(*args, **kwargs, **GREEDY)


def test_refuses_arguments_by_position(pair):
    ids = prompt(2, 5)["input_ids"]
    with pytest.raises(UsageError, match="input_ids was given twice, by position and by name"):
        pair[1](ids, input_ids=ids)
    with pytest.raises(UsageError, match="arguments by position, not 99"):
        pair[1](*[ids] * 99)


def test_runs_without_transformers(pair, folder):
    code = f"""
import sys, json
sys.modules["transformers"] = None
import torch
from moeopt.causal_lm.runner import CausalLM
from moeopt.backends.onnxrt.session import Session
from moeopt.errors import UsageError
engine = CausalLM(Session({str(folder / "model.onnx")!r}), json.load(open({str(folder / "signature.json")!r})))
first = engine(torch.tensor([[5, 6, 7]]))
print(engine(torch.tensor([[8]]), past_key_values=first.past_key_values).logits.argmax().item())
try:
    engine.generate(torch.tensor([[5, 6, 7]]))
except UsageError as err:
    print(err)
"""
    out = children.run([sys.executable, "-c", code], check=True).stdout.splitlines()
    with torch.no_grad():
        want = pair[0](torch.tensor([[5, 6, 7, 8]])).logits[0, -1].argmax().item()
    assert out == [str(want), "generate needs transformers: pip install 'moeopt[transformers]'"]


def test_what_is_a_causal_language_model():
    assert is_causal_lm(FAMILIES["mixtral"].build())
    assert not is_causal_lm(FAMILIES["switch_transformers"].build())
    assert not is_causal_lm(FAMILIES["mixtral"].build().model)
    assert not is_causal_lm(torch.nn.Linear(2, 2))


def with_router_logits(model):
    model.config.output_router_logits = True


@pytest.mark.parametrize(
    ("name", "change", "call", "text"),
    [
        (
            "minimax",
            None,
            {},
            "its cache is a MiniMaxCache; an engine carries a DynamicCache of attention, convolution",
        ),
        (
            "olmoe",
            with_router_logits,
            {},
            "returns (aux_loss|router_logits) beside logits and cache; set config.output_router_logits",
        ),
        ("olmoe", None, {"labels": torch.zeros(2, 9)}, "the example call gives labels, which an engine with a cache"),
    ],
)
def test_declines_with_a_reason(name, change, call, text):
    model = FAMILIES[name].build()
    if change:
        change(model)
    with pytest.raises(Declined, match=text):
        export_causal_lm(model, (), {**FAMILIES[name].inputs(), **call}, lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "llama4_text"])
def test_windows_sinks_latent_attention_and_complex_rotary(name, tmp_path):
    pair = exported(name, tmp_path)
    call = prompt(3, 30, padded=True)
    assert apart(*pair, call, followed(call, 2)) < ROUNDING
    del call["position_ids"]
    assert torch.equal(*[model.generate(**call, **GREEDY) for model in pair])


def optimized(model, **options):
    """The engine of ``model``, which is left as it is."""
    ids = prompt(2, 9)["input_ids"]
    return moeopt.optimize(copy.deepcopy(model), {"input_ids": ids}, backend="onnxruntime", **options)


def grown(name, **fields):
    from dataclasses import replace

    return replace(FAMILIES[name], config=FAMILIES[name].config | fields).build()


class LongAttention(torch.nn.Module):
    """Multiplies by a factor that code chooses by the number of tokens in sight, as log-n scaling does."""

    def __init__(self, attention, limit):
        super().__init__()
        self.attention, self.limit = attention, limit

    def forward(self, hidden_states, *args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the first since transformers 5.24
        seen = hidden_states.shape[1] + (0 if cache is None else cache.get_seq_length())
        y, weights = self.attention(hidden_states, *args, **kwargs)
        return (y * 3 if seen > self.limit else y), weights


def test_a_branch_on_the_length_is_kept_as_a_condition():
    model = grown("qwen3_moe", num_hidden_layers=1)
    model.model.layers[0].self_attn = LongAttention(model.model.layers[0].self_attn, 16)
    engine = optimized(model, verify="fast")
    ids = prompt(1, 30)["input_ids"]
    with torch.no_grad():
        assert (engine(ids[:, :16]).logits - model(ids[:, :16]).logits).abs().max() < ROUNDING
    with pytest.raises(UsageError, match=r"holds for calls where .*shape.* <= 16, because the model's code branches"):
        engine(ids)
    first = engine(ids[:, :16])
    with pytest.raises(UsageError, match="<= 16"):
        engine(ids[:, 16:17], past_key_values=first.past_key_values)
    assert any("the engine holds for calls where" in n and "<= 16" in n for n in engine.certificate.notes)
    unchecked = engine.model.causal_lm
    unchecked._check = lambda feeds: None  # as a user of plain ONNX Runtime calls it
    with pytest.raises(UsageError, match="at the node 'this engine holds only where .*<= 16' .Reshape."):
        unchecked(ids)


class OneTokenDiffers(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        y = self.mlp(x)
        return y * 2 if x.shape[1] == 1 else y


def test_a_program_of_its_own_for_one_token_is_seen():
    model = grown("qwen3_moe", num_hidden_layers=1)
    model.model.layers[0].mlp = OneTokenDiffers(model.model.layers[0].mlp)
    with pytest.raises(NotEquivalentError, match=r"moves by .* \(inputs of sizes \(2, 1\)\)"):
        optimized(model)


def test_a_model_left_in_training_mode_is_told_so():
    model = grown("mixtral", num_hidden_layers=1, attention_dropout=0.5).train()
    with pytest.raises(NotEquivalentError, match=r"the model is in training mode, .* call model.eval"):
        optimized(model, verify="fast")


@pytest.fixture(scope="module")
def windowed():
    """A model of one layer with a window of 8 tokens, and its engine."""
    model = grown("mixtral", num_hidden_layers=1, sliding_window=8)
    return model, optimized(model)


def test_the_certificate_says_what_else_was_compared(windowed):
    end = windowed[1].certificate.end_to_end
    assert "equal with 1 token a row, 36 tokens a row, through its cache too" in end.notes


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param("granitemoe", {"logits_scaling": 6.0}, marks=pytest.mark.nightly),
        ("gemma4_text", {"final_logit_softcapping": 30.0}),  # which divides and multiplies by a number as well
    ],
)
def test_scaled_and_capped_logits(name, fields):
    model = grown(name, **fields)
    engine = optimized(model, verify="off")
    call = prompt(3, 11, padded=True)
    assert apart(model, engine, call, followed(call, 1)) < ROUNDING


def test_a_users_own_attention_function_stays():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def narrow(module, query, key, value, attention_mask, **options):
        near = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).triu(-3)
        mask = near.tril()[-query.shape[2] :] & (True if attention_mask is None else attention_mask)
        return sdpa_attention_forward(module, query, key, value, mask.expand(query.shape[0], 1, -1, -1), **options)

    AttentionInterface.register("narrow", narrow)
    AttentionMaskInterface.register("narrow", sdpa_mask)
    model = grown("mixtral", num_hidden_layers=1)
    ids = prompt(1, 30)["input_ids"]
    with torch.no_grad():
        far = model(ids).logits
        model.config._attn_implementation = "narrow"
        want = model(ids).logits
    assert (far - want).abs().max() > 100 * ROUNDING
    assert (optimized(model, verify="off")(ids).logits - want).abs().max() < ROUNDING


def test_a_cache_cut_to_its_window_is_refused(windowed):
    model, engine = windowed
    ids = prompt(1, 20)["input_ids"]
    with torch.no_grad():
        cut = model(ids).past_key_values
    with pytest.raises(UsageError, match="layer 0 has seen 20 tokens and keeps 7, cut to its window"):
        engine(ids[:, :1], past_key_values=cut)


def test_generation_config_is_assigned_to_what_generates(windowed):
    from transformers import GenerationConfig

    engine = windowed[1].model
    engine.generation_config = GenerationConfig(max_new_tokens=4, do_sample=False)
    assert engine.generate(prompt(1, 5)["input_ids"]).shape == (1, 9)


def test_generation_code_of_the_models_own_class_is_not_dropped_silently(pair):
    from transformers import MixtralForCausalLM

    class Careful(MixtralForCausalLM):
        def _get_logits_processor(self, *args, **kwargs):
            return super()._get_logits_processor(*args, **kwargs)

    assert own_generation(Careful) == ["_get_logits_processor"] and own_generation(MixtralForCausalLM) == []
    signature = pair[1].signature | {"own_generation": own_generation(Careful), "architecture": "Careful"}
    with pytest.raises(UsageError, match="class Careful defines _get_logits_processor, which the engine does not"):
        CausalLM(pair[1].session, signature).generate(prompt(1, 5)["input_ids"])


def test_padded_rows_are_zeros_without_a_cache_too():
    model = grown("mixtral", num_hidden_layers=1)
    ids = prompt(2, 9)["input_ids"]
    mask = torch.ones_like(ids)
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
    engine = moeopt.optimize(copy.deepcopy(model), call, backend="onnxruntime", verify="off")
    padded = mask.clone()
    padded[0, :3] = 0
    with torch.no_grad():
        want = model(**call | {"attention_mask": padded})
    got = engine(**call | {"attention_mask": padded})
    assert (got.logits - want.logits).abs().max() < ROUNDING and abs(got.loss - want.loss) < ROUNDING


def test_float64_keeps_the_numbers_of_its_ops():
    """Epsilons of layer norms are float32 as attributes of ONNX ops, and fused ops have no float64 kernels."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    model = OPTForCausalLM(config).double().eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.02)
        engine = moeopt.optimize(model, {"input_ids": ids}, backend="onnxruntime", verify="off")
        want = model(input_ids=ids).logits
        torch.testing.assert_close(engine(input_ids=ids).logits, want, rtol=1e-13, atol=1e-13 * float(want.abs().max()))


def test_what_the_model_holds_stays_the_same_objects():
    family = FAMILIES["mixtral"]
    model = moeopt.optimize(family.build(), family.inputs(), verify="off").model
    held = model.shared = model.model.shared = {"a": [1]}
    export_causal_lm(model, (), family.inputs(), lambda line: None)
    assert model.shared is held and model.model.shared is held and held == {"a": [1]}
