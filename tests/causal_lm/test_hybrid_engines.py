"""Engines of hybrid models against the models: their convolution and recurrent states travel with the cache."""

import copy
import functools
import json
import sys

import pytest
import torch

from tests import children

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers.exporters")

import onnx_ir as ir

import moeopt
from moeopt.backends.onnxrt.session import Session
from moeopt.causal_lm.layers import parts_of
from moeopt.causal_lm.lm import export_causal_lm
from moeopt.causal_lm.runner import CausalLM
from moeopt.errors import Declined, UsageError
from tests.causal_lm.hybrids import GRANITE, TWICE
from tests.causal_lm.test_lm import CALLS, GREEDY, apart, exported, followed, prompt
from tests.families.build import FAMILIES

FACTOR = 4
"""An engine rounds as often as the model, in another order: its distance to float64 is the model's own, give or take
the luck of the greatest of some thousand logits."""
SLOW = pytest.mark.slow
MODELS = ["jamba", "qwen3_next", pytest.param("nemotron_h", marks=SLOW), pytest.param("lfm2_moe", marks=SLOW)]
MODELS.append(pytest.param("granitemoehybrid", marks=pytest.mark.nightly))  # Mamba 2, as nemotron_h
FAMILIES_HERE = {"jamba": TWICE, "granitemoehybrid": GRANITE}
ANEW = {"jamba"}  # several tokens after a cache start its states anew


class Engines:
    """Of each model asked for: the original, its engine, and the original in float64.

    Norms and some recurrences are float32 in the last, too: it shares that rounding with the original, not with the
    engine, which makes the tolerance narrower.
    """

    def __init__(self, root):
        self.root, self.made = root, {}

    def __call__(self, name):
        if name not in self.made:
            folder = self.root / name
            folder.mkdir()
            family = FAMILIES_HERE.get(name) or FAMILIES[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(FAMILIES, name, family)
                self.made[name] = (*exported(name, folder), family.build("eager").double())
        return self.made[name]


@functools.cache
def allowed(original, exact, length, tokens=1):
    """What an engine may be apart from float64 after ``length`` tokens and ``tokens`` more: a multiple of what the
    original is."""
    calls = [prompt(7, length, padded) for padded in (False, True)]
    return FACTOR * max(float(apart(exact, original, call, followed(call, tokens))) for call in calls)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", MODELS)
def test_any_batch_any_length_and_a_past(engines, name):
    original, engine, exact = engines(name)
    for length in (1, 2, 100):
        for tokens in (1,) if name in ANEW else (1, 3):
            tolerance = allowed(original, exact, length, tokens)
            for rows, padded in CALLS:
                call = prompt(rows, length, padded)
                assert apart(exact, engine, call, followed(call, tokens)) < tolerance, (rows, length, padded)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generates_the_same_tokens(engines, name, how):
    original, engine, _ = engines(name)
    call = prompt(3, 9, padded=True)
    del call["position_ids"]
    assert torch.equal(*[model.generate(**call, **GREEDY, **how) for model in (original, engine)])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [2, 9])
def test_caches_pass_from_one_to_the_other(engines, name, length):
    original, engine, exact = engines(name)
    call = prompt(3, length, padded=True)
    more = followed(call, 1)
    want = exact(**call, use_cache=True).past_key_values
    caches = [model(**call, use_cache=True).past_key_values for model in (original, engine)]
    for _ in range(2):  # the model and the engine take turns with both
        wanted = exact(**more, past_key_values=want).logits
        for cache, model in zip(caches, (engine, original), strict=True):
            result = model(**more, past_key_values=cache)
            assert result.past_key_values is cache
            assert (result.logits - wanted).abs().max() < allowed(original, exact, length)
        more, caches = followed(more, 1), caches[::-1]


def test_several_tokens_after_a_cache_are_refused_where_the_model_forgets(engines):
    _, engine, *_ = engines("jamba")
    call = prompt(2, 5)
    cache = engine(**call).past_key_values
    text = (
        "JambaForCausalLM starts its recurrent states anew where several tokens follow a cache, the engine would not: "
        "pass one token at a time, or the whole sequence without a cache"
    )
    with pytest.raises(UsageError, match=text):
        engine(**followed(call, 3), past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_the_whole_at_once_is_the_same_as_one_token_at_a_time(engines):
    for name in ("jamba", "qwen3_next"):
        original, engine, exact = engines(name)
        ids = prompt(2, 12)["input_ids"]
        cache, rows = None, []
        for at in range(12):
            result = engine(ids[:, at : at + 1], past_key_values=cache)
            cache = result.past_key_values
            rows.append(result.logits)
        with torch.no_grad():
            assert (torch.cat(rows, 1) - exact(ids).logits).abs().max() < allowed(original, exact, 12)


@pytest.fixture
def filled(engines):
    """An engine, a call of it and the cache that it returned: a layer of states, then one of attention."""
    _, engine, *_ = engines("qwen3_next")
    call = prompt(2, 5)
    return engine, followed(call, 1), engine(**call).past_key_values


def listed(cache):
    return [tuple(parts_of(layer).values()) for layer in cache.layers]


def test_a_list_of_tensors_is_a_cache_too(filled):
    engine, more, cache = filled
    got = engine(**more, past_key_values=listed(cache))
    assert torch.equal(got.logits, engine(**more, past_key_values=cache).logits)
    assert all(map(torch.equal, sum(got.past_key_values, ()), sum(listed(cache), ())))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda cache: [(cache[0][0], cache[0][1][:, :1]), cache[1]],
            r"layer 0 has recurrent_states.0 of \(2, 1, 8, 8\) where \(2, 4, 8, 8\) is needed; pass the cache that the "
            "engine returned",
        ),
        (
            lambda cache: [tuple(t[:1] for t in layer) for layer in cache],
            r"layer 0 has conv_states.0 of \(1, 64, 4\) where \(2, 64, 4\) is needed",
        ),
        (
            lambda cache: [tuple(t.repeat(2, 1, 1, 1) if t.dim() == 4 else t for t in layer) for layer in cache],
            r"layer 0 has recurrent_states.0 of \(4, 4, 8, 8\) where \(2, 4, 8, 8\) is needed",
        ),
        (lambda cache: cache[1:], " has 1 layers; the model has 2"),
        (lambda cache: [cache[0][:1], cache[1]], "layer 0 has recurrent_states.0 of nothing where"),
        (lambda cache: [(), cache[1]], "layer 0 has conv_states.0 of nothing where"),
        (lambda cache: [cache[0], ()], "layer 1 has keys of nothing where"),
    ],
    ids=["state", "batch", "rows of some", "layer", "half a layer", "no states", "no attention"],
)
def test_another_cache_is_refused(filled, change, text):
    engine, more, cache = filled
    with pytest.raises(UsageError, match=f"^past_key_values.*{text}"):
        engine(**more, past_key_values=change(listed(cache)))


def test_a_cache_without_a_layer_is_refused(filled):
    engine, more, cache = filled
    cache.layers.pop()
    with pytest.raises(UsageError, match="past_key_values has 1 layers; the model has 2"):
        engine(**more, past_key_values=cache)


def test_a_cache_that_records_its_past_is_refused(filled):
    engine, more, cache = filled
    cache.layers[0].record_past = True
    text = "past_key_values records its past states to be cropped; the engine keeps the last ones only"
    with pytest.raises(UsageError, match=text):
        engine(**more, past_key_values=cache)


def test_runs_without_transformers(engines):
    original, *_ = engines("qwen3_next")
    folder = engines.root / "qwen3_next"
    code = f"""
import sys, json
sys.modules["transformers"] = None
import torch
from moeopt.causal_lm.runner import CausalLM
from moeopt.backends.onnxrt.session import Session
engine = CausalLM(Session({str(folder / "model.onnx")!r}), json.load(open({str(folder / "signature.json")!r})))
cache = None
for tokens in ([5, 6, 7], [8], [9]):
    result = engine(torch.tensor([tokens]), past_key_values=cache)
    cache = result.past_key_values
    print(result.logits[0, -1].argmax().item())
print([len(layer) for layer in cache])
"""
    out = children.run([sys.executable, "-c", code], check=True).stdout.splitlines()
    with torch.no_grad():
        want = original(torch.tensor([[5, 6, 7, 8, 9]])).logits[0].argmax(-1)[2:].tolist()
    assert out == [*map(str, want), "[2, 2]"]


@pytest.mark.slow
@torch.no_grad()
def test_a_16_bit_model_computes_in_float32_between_calls():
    family = FAMILIES["jamba"]
    original = family.build().to(torch.bfloat16)
    exact = copy.deepcopy(original).float()
    engine = moeopt.optimize(copy.deepcopy(original), family.inputs(), backend="onnxruntime", verify="off").model
    for rows, length in ((1, 1), (3, 9), (3, 40)):
        call = prompt(rows, length, padded=True)
        more, real = followed(call, 1), call["attention_mask"].bool()
        first, second = [], []
        for model in (exact, original, engine):
            result = model(**call, use_cache=True)
            first.append(result.logits[real].float())
            second.append(model(**more, past_key_values=result.past_key_values).logits.float())
        # one rounding to bfloat16 at the end: half of its last place
        assert (first[2] - first[0]).abs().max() <= 2**-8 * first[0].abs().max()
        # states were rounded once more between the calls: far less than what the model rounds at every op
        assert (second[2] - second[0]).abs().max() < (second[1] - second[0]).abs().max() / 2
    mine, theirs = engine(**call).past_key_values, original(**call).past_key_values
    for name, state in parts_of(theirs.layers[0]).items():  # recurrent ones stay float32, as the model keeps them
        assert parts_of(mine.layers[0])[name].dtype == state.dtype
    assert engine(**more, past_key_values=theirs).logits.isfinite().all()


def _backwards(scan):
    name, count = "scan_input_directions", scan.attributes["num_scan_inputs"].as_int()
    scan.attributes[name] = ir.AttrInt64s(name, [1] * count)


def _forgetful(scan):
    body = scan.attributes["body"].as_graph()
    body.outputs[0].producer().replace_input_with(0, body.inputs[0])


HARMED = [
    ("jamba", _backwards, 0),
    ("jamba", _forgetful, -1),
    ("qwen3_next", _backwards, -1),
    ("qwen3_next", _forgetful, 0),
    pytest.param("jamba", _backwards, -1, marks=pytest.mark.nightly),
    pytest.param("jamba", _forgetful, 0, marks=pytest.mark.nightly),
    pytest.param("qwen3_next", _backwards, 0, marks=pytest.mark.nightly),
    pytest.param("qwen3_next", _forgetful, -1, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("name", "harm", "number"), HARMED)
def test_the_comparison_sees_a_loop_gone_wrong(engines, tmp_path, name, harm, number):
    original, _, exact = engines(name)
    folder = engines.root / name
    model = ir.load(folder / "model.onnx")
    scans = [node for node in model.graph if node.op_type == "Scan"]
    assert len(scans) == {"jamba": 4, "qwen3_next": 2}[name]
    harm(scans[number])
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    engine = CausalLM(Session(tmp_path / "model.onnx"), json.loads((folder / "signature.json").read_text()))
    call = prompt(3, 9, padded=True)
    assert apart(exact, engine, call, followed(call, 1)) > 20 * allowed(original, exact, 9)


def test_an_engine_without_a_form_for_states_is_refused_by_name():
    family = FAMILIES["qwen3_next"]
    with pytest.raises(Declined, match=r"linear_attn keeps a recurrent state, for which a TensorRT engine has no form"):
        export_causal_lm(
            family.build("eager"),
            (),
            family.inputs(),
            lambda line: None,
            "tensorrt",
            without_states="a TensorRT engine",
        )
