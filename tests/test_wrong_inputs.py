"""What is given in place of a model, or of its inputs: the message says what it is and how to get what is wanted."""

import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import moeopt
from moeopt.cli import main
from moeopt.errors import MoeoptError, UsageError
from tests.backends.torch.toys import H, build
from tests.test_hugging_face import cached, encoded, make, tokenizer

X = torch.randn(3, H)
IDS = torch.tensor([[5, 6, 7]])


def told(model, *inputs, **fields):
    """The message of the error of ``optimize``, and no other error."""
    with pytest.raises(MoeoptError) as raised:
        moeopt.optimize(model, *inputs, verify="off", **fields)
    return str(raised.value)


def of_module(name):
    return types.new_class("Functional", (), {}, lambda body: body.update(__module__=name))()


MODELS = [
    (lambda: nn.Linear, "model is a type; give an nn.Module, .*: Linear is a class: give an instance of it, Linear"),
    (lambda: torch.jit.ScriptModule, "ScriptModule is a class: give an instance"),
    (lambda: build().state_dict(), r"a state dict has weights and no code: make the model, and model.load_state_dict"),
    (lambda: build().forward, "it is a method: give the Toy itself"),
    (lambda: [build(), build()], "give one model at a time"),
    (lambda: X, "the model comes first, then its example inputs"),
    (lambda: lambda x: x, "put it into the forward of an nn.Module"),
    (lambda: of_module("keras.src.models.functional"), "it is of Keras, and moeopt reads PyTorch: .* .onnx file"),
    (lambda: of_module("flax.linen"), "it is of Flax, and moeopt reads PyTorch"),
]


@pytest.mark.parametrize("number", range(len(MODELS)))
def test_what_is_no_model_is_told_with_the_way_to_one(number):
    made, text = MODELS[number]
    with pytest.raises(UsageError, match=text):
        moeopt.optimize(made(), X, verify="off")


def test_a_class_a_config_or_a_pipeline_of_transformers_is_told():
    import transformers

    model = make()
    assert "AutoModelForCausalLM is a class: give AutoModelForCausalLM.from_pretrained(...)" in told(
        transformers.AutoModelForCausalLM, X
    )
    assert "a config has no weights: AutoModelForCausalLM.from_config(config)" in told(model.config, X)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    assert "give its .model, the Qwen3MoeForCausalLM in it" in told(pipe, X)


FILES = [
    ("m.gguf", "m.gguf is a GGUF file: transformers reads many into PyTorch"),
    ("weights.bin", "is weights without code: make the model, model.load_state_dict(torch.load('weights.bin'))"),
    ("model.PT", "is weights without code"),
    ("model.safetensors", "is the weights of a model: give its directory, "),
    ("engine.plan", "is an engine of TensorRT, built already: give the model that it was made of"),
    ("model.h5", "is a model of Keras: export it to an .onnx file"),
    ("other.json", "is a JSON file of another name than config.json: give the directory of the model"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), FILES)
def test_a_file_of_another_kind_is_told_by_its_name(tmp_path, capsys, name, text):
    (tmp_path / name).write_bytes(b"GGUF")
    assert text in told(tmp_path / name)
    with pytest.raises(SystemExit) as stop:
        main(["optimize", str(tmp_path / name)])
    assert stop.value.code == 2 and text in capsys.readouterr().err
    assert text not in told(tmp_path / "nowhere" / name), "there is no such file"


KINDS = [
    (lambda: X.numpy(), "example_inputs is a numpy ndarray: give torch.as_tensor(example_inputs)"),
    (lambda: DataLoader(TensorDataset(X)), "example_inputs is a DataLoader; .*: give one batch of it, .* next"),
    (lambda: TensorDataset(X), "give one batch of it"),
    (lambda: iter([X]), "give one batch of it"),
    (lambda: "hello", r"is text: give what a tokenizer makes of it, tokenizer\(text, return_tensors='pt'\)"),
    (tokenizer, r"a tokenizer makes inputs from text: give tokenizer\(text, return_tensors='pt'\)"),
]


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_inputs_of_another_kind_are_told_with_the_way_to_tensors(number):
    import re

    made, text = KINDS[number]
    assert re.search(text.replace("(example_inputs)", r"\(example_inputs\)"), told(build(), made()))


TOKENS = [
    (lambda: [[5, 6, 7]], "input_ids is a list of numbers: give torch.tensor(input_ids), or return_tensors='pt'"),
    (lambda: [5, 6, 7], "input_ids is a number: a list is read as positional arguments"),
    (lambda: ["a", "b"], "input_ids is text: give what a tokenizer makes of it"),
    (lambda: tokenizer()(["a"]), "input_ids is a list of numbers: give torch.tensor(input_ids)"),
    (lambda: tokenizer()(["a"], return_tensors="np"), "input_ids is a numpy ndarray: give torch.as_tensor(input_ids)"),
    (lambda: [dict(encoded())], "input_ids is a dict: of several calls' inputs, give one call's, inputs[0]"),
    (lambda: {"inputs_ids": IDS}, "did you mean 'input_ids' by 'inputs_ids'? its forward takes input_ids, attention_"),
    (lambda: {"input_ids": IDS + 500}, "input_ids holds 507, and the model knows the ids 0 to 127"),
    (lambda: {"input_ids": IDS.float()}, "input_ids holds float32 numbers, and ids are whole: give input_ids.long()"),
    (lambda: IDS[0], "input_ids has one axis: give input_ids[None], a batch of one row"),
]


@pytest.mark.parametrize("number", range(len(TOKENS)))
def test_a_language_model_that_refuses_its_inputs_says_what_is_odd(number):
    made, text = TOKENS[number]
    said = told(make(), made())
    assert "check that it runs on these inputs in eager mode" in said and text in said


TENSORS = [
    (lambda: X.half(), "x is float16 and the weights are float32: give x.to(torch.float32), or dtype='float16'"),
    (lambda: X.to("meta"), "x is on meta and the weights on cpu: give x.to('cpu')"),
    (lambda: X.to_sparse(), "x is a sparse tensor (torch.sparse_coo): give x.to_dense()"),
    (lambda: torch.nested.as_nested_tensor([X, X[:1]], layout=torch.jagged), "torch.nested.to_padded_tensor(x, 0.0)"),
    (lambda: {"y": X}, "check that it runs on these inputs in eager mode: its forward takes x"),
    (lambda: (), "missing 1 required positional argument: 'x'; check that .*: its forward takes x"),
    (lambda: {"x": np.ones((3, H), "float32")}, "x is a numpy ndarray: give torch.as_tensor(x)"),
]


@pytest.mark.parametrize("number", range(len(TENSORS)))
def test_a_block_that_refuses_its_inputs_says_what_is_odd(number):
    made, text = TENSORS[number]
    said = told(build(), made())
    assert all(part in said for part in text.split(".*"))
    assert len(said) < 900, "torch lists every kernel that it has"


def test_an_error_that_the_inputs_do_not_explain_is_given_no_reason():
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("out of luck")

    line = Fails.forward.__code__.co_firstlineno + 1
    assert told(Fails(H, H), X).endswith(f"in eager mode (at {__file__}:{line})")


def test_inputs_given_as_options_are_told():
    said = told(make(), **encoded())
    assert "input_ids, attention_mask: these are inputs of Qwen3MoeForCausalLM, no options" in said
    assert "moeopt.optimize(model, dict(input_ids=...))" in said


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device")
def test_a_device_of_another_maker_is_not_told_to_be_cuda():
    said = told(build(), X, device="mps")
    assert "device='mps': this machine has no mps device that this torch can use" in said and "CUDA" not in said


def test_a_model_of_the_local_cache_is_taken_by_its_name(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = cached(tmp_path, "someone/tiny-moe")
    fast = moeopt.optimize("someone/tiny-moe", verify="off")
    assert [b.status for b in fast.report.blocks if b.kind == "moe"] == ["rewritten"]
    assert moeopt.inspect("someone/tiny-moe").counts == moeopt.inspect(folder).counts
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "someone/tiny-moe"])
    assert not stop.value.code and "4 experts" in capsys.readouterr().out
    with pytest.raises(UsageError, match="does not exist"):
        moeopt.inspect("someone/absent")
