"""What lies beside a language model's engine: config, tokenizer, licence, card; and GenAI's files, run in GenAI."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
pytest.importorskip("transformers.exporters")

import transformers

import moeopt
from moeopt.causal_lm.genai import why_not_genai
from tests.families.build import FAMILIES

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny_lm"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model's directory as the hub has it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    model = FAMILIES["qwen3_moe"].build()
    model.generation_config.eos_token_id = [62, 63]
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("You may.")
    return folder


@pytest.fixture(scope="module")
def bundle(source, tmp_path_factory):
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    engine = moeopt.optimize(model, {"input_ids": torch.tensor([[5, 6, 7, 8]])}, backend="onnxruntime", verify="fast")
    return engine.save(tmp_path_factory.mktemp("bundle") / "engine")


def test_the_graph_has_the_names_that_other_runtimes_look_for(bundle):
    import onnx_ir

    graph = onnx_ir.load(bundle / "model.onnx").graph
    layers = [f"{n}.{part}" for n in range(2) for part in ("key", "value")]
    ids = ["input_ids", "attention_mask", "position_ids", "logits_to_keep"]
    assert [v.name for v in graph.inputs] == [*ids, *(f"past_key_values.{name}" for name in layers)]
    assert [v.name for v in graph.outputs] == ["logits", *(f"present.{name}" for name in layers)]
    sizes = {v.name: [str(d) for d in v.shape] for v in (*graph.inputs, *graph.outputs)}
    assert sizes["input_ids"] == ["batch", "sequence"] and sizes["attention_mask"] == ["batch", "total_sequence"]
    assert sizes["past_key_values.1.value"] == ["batch", "2", "past_sequence", "8"]
    assert sizes["present.0.key"] == ["batch", "2", "past_sequence + sequence", "8"]
    used = {d.value for n in graph for v in n.outputs for d in v.shape or () if isinstance(d, onnx_ir.SymbolicDim)}
    assert not [word for word in used if word and word[0] == "s" and word[1:].isdigit()], "sizes of the exporter's own"


def test_nodes_are_named_by_the_path_of_their_module(bundle):
    import onnx_ir

    names = [node.name for node in onnx_ir.load(bundle / "model.onnx").graph.all_nodes()]
    assert not [name for name in names if name.startswith("node_") or not name]
    assert len([name for name in names if "/" in name]) > 0.95 * len(names)
    for layer in (f"model.layers.{n}" for n in range(2)):
        assert f"{layer}.self_attn.o_proj/MatMul" in names and f"{layer}.mlp.gate/TopK" in names
        assert len([name for name in names if name.startswith(f"{layer}.")]) > 30


def test_config_tokenizer_and_licence_travel_along(bundle, source):
    assert transformers.AutoConfig.from_pretrained(bundle).model_type == "qwen3_moe"
    assert str(source) not in (bundle / "config.json").read_text()
    assert transformers.GenerationConfig.from_pretrained(bundle).eos_token_id == [62, 63]
    for name in ("tokenizer.json", "LICENSE"):
        assert (bundle / name).read_bytes() == (source / name).read_bytes()
        assert name in json.loads((bundle / "moeopt.json").read_text())["files"]
    card = (bundle / "README.md").read_text()
    assert "Tokenizer: in this directory." in card and "Licence of the weights: LICENSE." in card
    assert "ONNX Runtime GenAI: files are in this directory." in card


def test_a_bundle_is_no_model_directory(bundle, tmp_path, capsys):
    from moeopt.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["explain", str(bundle)])
    assert stop.value.code == 2
    assert "is a bundle" in capsys.readouterr().err
    with pytest.raises(moeopt.UsageError, match="is a bundle"):
        moeopt.inspect(bundle)


def test_a_damaged_companion_is_told(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "LICENSE").write_text("You may not.")
    with pytest.raises(moeopt.BundleError, match="LICENSE"):
        moeopt.load(copy)


def test_a_model_of_no_directory_says_so(tmp_path):
    engine = moeopt.optimize(
        FAMILIES["qwen3_moe"].build(), FAMILIES["qwen3_moe"].inputs(), backend="onnxruntime", verify="off"
    )
    card = (engine.save(tmp_path / "bundle") / "README.md").read_text()
    assert "Tokenizer: not known where the engine was made; use that of the model." in card


def test_genai_generates_the_same_tokens(bundle):
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(bundle))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=24)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(torch.tensor([[5, 6, 7, 8]], dtype=torch.int32).numpy())
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)]
    own = moeopt.load(bundle).generate(torch.tensor([[5, 6, 7, 8]]), max_length=24, do_sample=False)[0].tolist()
    assert theirs == own and len(own) > 10


def caller(**changed):
    layer = {part: {"heads": 2, "size": 8} for part in ("keys", "values")}
    whole = {
        "cache": [layer, layer],
        "inputs": {"input_ids": {}, "attention_mask": {}},
        "config": {"max_position_embeddings": 64, "hidden_size": 16, "num_attention_heads": 2},
    }
    return {**whole, **changed}


@pytest.mark.parametrize(("changed", "why"), [
    ({}, ""),
    ({"cache": [{"conv_states.0": {"shape": [4]}}]}, "and this one has other states"),
    ({"cache": [{p: {"heads": h, "size": 8} for p in ("keys", "values")} for h in (1, 2)]}, "this model has several"),
    ({"inputs": {"input_ids": {}, "token_type_ids": {}}}, "it does not feed token_type_ids"),
    ({"one_at_a_time": True}, "takes prompts token by token"),
    ({"conditions": [["ge", 0, 1]]}, "holds for some sizes only"),
    ({"config": {"hidden_size": 16, "num_attention_heads": 2}}, "does not say for how many tokens it is"),
    ({"config": {"max_position_embeddings": 64, "num_attention_heads": 2}}, "the model's config has no hidden_size"),
])  # fmt: skip
def test_why_genai_cannot_drive_it(changed, why):
    assert why in why_not_genai(caller(**changed)) and bool(why) == bool(why_not_genai(caller(**changed)))
