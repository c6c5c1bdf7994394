"""A config.json that is none is told with the file and the field, by whatever reads the directory first."""

import json

import pytest

import moeopt
from moeopt.errors import UsageError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FIELDS = dict(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"])


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return tmp_path


@pytest.mark.parametrize("call", [moeopt.inspect, moeopt.optimize, moeopt.explain], ids=lambda call: call.__name__)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, r"cannot be read as JSON \(.*recursion.*\): fetch the file again"),
        ("", r"cannot be read as JSON \(Expecting value.*\): fetch the file again"),
        ("[1]", r"holds a list, not a table of fields"),
        (json.dumps({**FIELDS, "architectures": [{"a": 1}]}), r"architectures is \[\{'a': 1\}\], .* a list of names"),
        (json.dumps({**FIELDS, "architectures": 3}), r"architectures is 3, .* fetch it again, or mend the entry"),
        (json.dumps({**FIELDS, "model_type": ["qwen3_moe"]}), r"model_type is \['qwen3_moe'\], and has to be a str"),
        (json.dumps({**FIELDS, "quantization_config": "fp8"}), r"quantization_config is 'fp8', and has to be a dict"),
        (json.dumps({**FIELDS, "auto_map": "modeling.py"}), r"auto_map is 'modeling.py', and has to be a dict: fetch"),
    ],
)  # fmt: skip
def test_what_is_no_config(directory, call, text, words):
    (directory / "config.json").write_text(text)
    with pytest.raises(UsageError, match=rf"{directory}/config.json:? {words}"):
        call(directory)


def test_an_architecture_that_stands_alone_is_a_list_of_one(tmp_path):
    fields = transformers.Qwen3MoeConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**fields, **FIELDS, "architectures": "Qwen3MoeForCausalLM"}))
    assert moeopt.inspect(tmp_path).name == "Qwen3MoeForCausalLM"


def test_files_that_an_index_names_and_nobody_brought(directory):
    (directory / "model.safetensors").rename(directory / "part-1.safetensors")
    fields = transformers.Qwen3MoeConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2).to_dict()
    (directory / "config.json").write_text(json.dumps({**fields, **FIELDS}))
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-3.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    found = (
        "part-2.safetensors is missing, and the directory's index names it (2 such files): what is said of its files"
    )
    assert any(found in note for note in moeopt.inspect(directory).notes)
