"""A Hugging Face model as its owner uses it: a tokenizer gives the inputs; ``save``, ``pipeline``, tasks, the cache."""

import inspect
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

import moeopt
from moeopt.cli import main
from moeopt.cli.hugging_face import auto_class
from moeopt.find.example_inputs import made_up, without_cache

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = dict(
    vocab_size=128, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1, num_experts=4,
    num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1,
)  # fmt: skip


def make(kind="ForCausalLM", **other):
    torch.manual_seed(0)
    return getattr(transformers, f"Qwen3Moe{kind}")(transformers.Qwen3MoeConfig(**{**SIZES, **other})).eval()


def tokenizer():
    """One token for each printable letter."""
    from tokenizers import Tokenizer, decoders, models

    letters = ["<pad>", "<eos>", *map(chr, range(32, 127))]
    made = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    made.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # older versions add token_type_ids, which no decoder takes
    )


def encoded():
    return tokenizer()(["mixture of", "experts"], return_tensors="pt", padding=True)


@pytest.mark.parametrize("kind", ["ForCausalLM", "ForSequenceClassification", "Model"])
def test_what_a_tokenizer_gives_is_optimised_saved_and_loaded(tmp_path, kind):
    model, inputs = make(kind), encoded()
    fast = moeopt.optimize(model, inputs, verify="fast")
    assert [b.status for b in fast.report.blocks if b.kind == "moe"] == ["rewritten"]
    generates = kind == "ForCausalLM"
    said = any("use_cache=False: what is verified and saved takes whole sequences" in n for n in fast.report.notes)
    assert said == generates
    fast.save(tmp_path / "b")
    loaded = moeopt.load(tmp_path / "b")
    with torch.no_grad():
        want, got = model(**inputs), loaded(**inputs)
    assert type(got) is type(want)
    assert got.past_key_values is None if generates else type(got.past_key_values) is type(want.past_key_values)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert moeopt.verify(tmp_path / "b").passed
    assert moeopt.verify(tmp_path / "b", original=model, inputs=inputs).passed


def granite():
    """A language model whose ``forward`` takes ``use_cache`` among its ``**kwargs``."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("moe_intermediate_size", "head_dim")}
    config = transformers.GraniteMoeConfig(**sizes, num_local_experts=4)
    return transformers.GraniteMoeForCausalLM(config).eval(), encoded()


def switch():
    """The same of a model with an encoder and a decoder, which returns a cache of both."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=128, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=2, num_experts=4, expert_capacity=64, decoder_start_token_id=0,
    )  # fmt: skip
    inputs = encoded()
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    return model, {**inputs, "decoder_input_ids": inputs["input_ids"][:, :3]}


@pytest.mark.parametrize("made", [granite, switch])
def test_a_cache_that_is_asked_for_among_kwargs_is_left_out_too(tmp_path, made):
    torch.manual_seed(0)
    model, inputs = made()
    if "use_cache" in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers names use_cache")
    assert without_cache(model, ((), dict(inputs)))[1]["use_cache"] is False
    fast = moeopt.optimize(model, inputs, verify="fast")
    assert any("use_cache=False" in note for note in fast.report.notes)
    fast.save(tmp_path / "b")
    with torch.no_grad():
        want, got = model(**inputs, use_cache=False), moeopt.load(tmp_path / "b")(**inputs)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)


def test_the_live_model_keeps_its_cache():
    model = make()
    fast = moeopt.optimize(model, encoded(), verify="off")
    assert fast(**encoded()).past_key_values is not None
    assert torch.equal(fast.generate(**encoded(), max_new_tokens=4), model.generate(**encoded(), max_new_tokens=4))


def test_a_call_that_names_its_cache_stays_as_it_is():
    ids = torch.ones(1, 3, dtype=torch.int64)
    model = make()
    assert without_cache(model, ((ids,), {}))[1] == {"use_cache": False}
    for given in ({"use_cache": True}, {"past_key_values": None}):
        assert without_cache(model, ((ids,), given))[1] == given
    assert without_cache(torch.nn.Linear(2, 2), ((ids,), {})) == ((ids,), {})


def test_an_engine_in_a_pipeline_and_with_stop_strings(caplog):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if not hasattr(transformers, "exporters"):
        pytest.skip("this transformers has no ONNX exporter")
    model, words = make(), tokenizer()
    engine = moeopt.optimize(model, encoded(), backend="onnxruntime", verify="fast")
    assert not any("use_cache" in note for note in engine.report.notes)
    fixed = dict(max_new_tokens=6, do_sample=False)
    with caplog.at_level(logging.ERROR, "transformers.pipelines.base"):
        texts = [
            transformers.pipeline("text-generation", model=one, tokenizer=words)("experts", **fixed)
            for one in (engine, model)
        ]
    assert texts[0] == texts[1] and "is not supported for text-generation" not in caplog.text
    stop = words.decode(model.generate(**encoded(), **fixed)[0, -4:-3])
    one = {"input_ids": encoded()["input_ids"][:1]}
    tokens = [e.generate(**one, **fixed, stop_strings=[stop], tokenizer=words) for e in (engine, model)]
    assert torch.equal(*tokens) and tokens[0].shape[1] < one["input_ids"].shape[1] + 6
    with pytest.raises(moeopt.errors.UsageError, match="ids: the engine was exported .* the engine takes attention_m"):
        engine(ids=one["input_ids"])


def test_an_engine_without_a_cache_says_why_in_the_report():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    call = {**encoded(), "output_hidden_states": True}
    engine = moeopt.optimize(make(), call, backend="onnxruntime", verify="fast")
    (note,) = [note for note in engine.report.notes if note.startswith("the engine has no key/value cache: ")]
    assert note.endswith(
        "the example call gives output_hidden_states, which an engine with a cache does not take; leave it out for one"
    )


def test_made_up_inputs_of_classifiers_and_image_models():
    one = make("ForSequenceClassification", pad_token_id=None)
    assert made_up(one, 0)[1]["input_ids"].shape[0] == 1  # it takes the last token, and knows no padding
    assert made_up(make("ForSequenceClassification"), 0)[1]["input_ids"].shape[0] == 2
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                               image_size=16, patch_size=8)
    ).eval()  # fmt: skip
    assert made_up(vit, 0)[1]["pixel_values"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("architecture", "task", "auto"),
    [
        ("Qwen3MoeForCausalLM", None, "AutoModelForCausalLM"),
        ("Qwen3MoeForSequenceClassification", None, "AutoModelForSequenceClassification"),
        ("Qwen3MoeModel", None, "AutoModel"),
        ("BertForMaskedLM", None, "AutoModelForMaskedLM"),
        ("SwitchTransformersForConditionalGeneration", None, "AutoModelForSeq2SeqLM"),
        ("ViTForImageClassification", None, "AutoModelForImageClassification"),
        ("Qwen3MoeForCausalLM", "feature-extraction", "AutoModel"),
        ("NobodyKnows", None, "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_loads_a_model(tmp_path, architecture, task, auto):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert auto_class(tmp_path, task) == auto


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


def cached(folder: Path, name: str) -> Path:
    """A hub's cache in ``folder`` that holds one model."""
    home = folder / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    make("ForSequenceClassification").save_pretrained(home / "snapshots" / "abc")
    return home / "snapshots" / "abc"


def test_a_model_of_the_local_cache_by_its_name(capsys, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sys.modules["huggingface_hub.file_download"].constants, "HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "someone/tiny-moe")
    code, out, err = run(capsys, "optimize", "someone/tiny-moe", "--verify", "fast", "--out", tmp_path / "b")
    assert code == 0 and "moeopt: Qwen3MoeForSequenceClassification on torch" in out, err
    assert f"saved: {tmp_path / 'b'}" in out
    code, _, err = run(capsys, "explain", "someone/absent")
    assert code == 2 and "someone/absent is neither a file nor a model in the local Hugging Face cache" in err
    assert "moeopt downloads nothing: `hf download someone/absent` brings it, or give the model's directory" in err


def test_the_models_own_directory_is_no_place_for_the_bundle(capsys, tmp_path):
    make().save_pretrained(tmp_path / "model")
    code, _, err = run(capsys, "optimize", tmp_path / "model", "--out", tmp_path / "model")
    assert code == 2 and "is the model's own directory: give a new one" in err


RECORDED = ["output_hidden_states", "output_attentions", "output_router_logits"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("backend", "called_before", "extra"),
    [
        *(("torch", called, extra) for called in (False, True) for extra in RECORDED),
        ("onnxruntime", False, RECORDED[2]),
        ("onnxruntime", True, RECORDED[0]),
    ],
)
def test_what_a_model_records_of_its_layers_is_returned_once(backend, called_before, extra):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, reference = make(attn_implementation="eager"), make(attn_implementation="eager")
    reference.load_state_dict(model.state_dict())
    call = {**encoded(), extra: True, "use_cache": False}
    with torch.no_grad():
        if called_before:
            model(**call)
        engine = moeopt.optimize(model, call, backend=backend, verify="fast")
        wanted = reference(**call)
        for one in (engine, model):
            assert list(one(**call)) == list(wanted)
            torch.testing.assert_close(tuple(one(**call)[-1]), tuple(wanted[-1]), rtol=1e-4, atol=1e-4)
