"""What cannot be inspected is refused with one message that says the way out."""

import json
import struct
import sys

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import CheckpointError, UsageError
from tests.toy_moe import mixtral

TINY = {
    "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def look(target, **options):
    return moeopt.inspect(target, device="H100", **options)


def without(*names):
    return {k: v for k, v in TINY.items() if k not in names}


def write(path, fields):
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (without("model_type"), "has no field model_type, so nothing tells which model it is for"),
        (TINY | {"model_type": "mixtrall"}, "does not know model_type 'mixtrall'; did you mean 'mixtral'?"),
        (without("hidden_size", "num_local_experts"), "lacks hidden_size, num_local_experts; transformers"),
        (TINY | {"hidden_size": "wide"}, "transformers refuses this config"),
        (TINY | {"num_key_value_heads": 0, "head_dim": None}, "transformers cannot build this model"),
        (TINY | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "pass --trust-remote-code"),
    ],
)  # fmt: skip
def test_configs(fields, message):
    with pytest.raises(UsageError) as err:
        look(fields)
    assert message in str(err.value) and str(err.value).startswith("the dict")


def test_remote_code_is_not_run_without_the_flag(tmp_path):
    write(tmp_path / "config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UsageError, match="defined by Python code of its own"):
        look(tmp_path)
    assert not (tmp_path / "ran").exists()


MINE = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class Config(PretrainedConfig):
    model_type = "mine"

class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.post_init()
"""


def test_remote_code_runs_with_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    home = tmp_path / "mine_of_a_test"
    home.mkdir()
    write(home / "config.json", {"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}})  # fmt: skip
    (home / "mine.py").write_text(MINE)
    assert look(home, trust_remote_code=True).counts.all == 64


def test_remote_code_that_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    home = tmp_path / "broken_of_a_test"
    home.mkdir()
    write(home / "config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "gone.Config"}})
    with pytest.raises(UsageError, match="the model's own code failed"):
        look(home, trust_remote_code=True)


def test_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("")
    for name, message in {
        "empty": "has neither config.json nor weights",
        "weights": "has weights and no config.json",
        "absent": "does not exist: give a model, a Hugging Face config",
        "broken.json": "cannot be read as JSON",
        "list.json": "holds a list, not a table of fields",
        "notes.txt": "is no config",
    }.items():
        with pytest.raises(UsageError) as err:
            look(tmp_path / name)
        assert message in str(err.value), name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x05\x00", "the whole file has 2"),
        (struct.pack("<Q", 1 << 60) + b"{}", "its header should have 1152921504606846976 bytes"),
        (struct.pack("<Q", 4) + b"oops", "its header is not JSON"),
        (struct.pack("<Q", 2) + b"[]", "its header is not a table of tensors"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "the entry of tensor 'a' has no shape"),
        (struct.pack("<Q", 20) + b'{"a": {"shape": [1]}', "its header is not JSON"),
        (struct.pack("<Q", 21) + b'{"a": {"shape": [1]}}', "the entry of tensor 'a' lacks a dtype or data_offsets"),
        (struct.pack("<Q", 58) + b'{"a": {"dtype":"F32","shape":[9],"data_offsets":[ 0, 36]}}', "the data should end"),
    ],
)  # fmt: skip
def test_a_damaged_safetensors_header(tmp_path, data, message):
    write(tmp_path / "config.json", TINY)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError) as err:
        look(tmp_path)
    assert "model.safetensors is damaged: " in str(err.value) and message in str(err.value)
    assert "inspect its config.json alone" in str(err.value)


def test_a_good_directory(tmp_path):
    model = mixtral().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    model.float()
    found = look(tmp_path)
    assert found.source == "checkpoint" and found.counts.all == model.num_parameters()
    assert found.stored.elements == {"BF16": found.counts.all} and found.stored.bytes == 2 * found.counts.all
    assert look(tmp_path / "config.json").stored is None
    assert look(model.config).counts == look(model).counts == found.counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0 must be a whole number from 1 on"),
        ({"prompt": 1.5}, "prompt=1.5 must be a whole number"),
        ({"bits": 5}, "bits=5 must be one of 32, 16, 8, 4"),
        ({"top_k": 9}, "top_k=9 is more than the 4 experts of model.layers.0.mlp"),
        ({"device": "H1000"}, "device 'H1000' is not known"),
        ({"device": "A100"}, "did you mean A100-40GB or A100-80GB?"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(UsageError) as err:
        moeopt.inspect(TINY, **{"device": "H100"} | options)
    assert message in str(err.value)


def test_things_that_are_no_model():
    with pytest.raises(UsageError, match="a int cannot be read: give a model"):
        look(7)
    with pytest.raises(UsageError, match="Identity has no parameters, so there is nothing to inspect"):
        look(nn.Identity())
