"""``inspect(quantize=)``: what the experts' format would make of a model, against counts by hand."""

import json

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from moeopt.ir.weight_format import INT4_BLOCK32, INT8_CHANNEL
from tests.inspection.test_inspect_command import run

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "intermediate_size": 96, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize(("name", "format"), [("int4", INT4_BLOCK32), ("int8", INT8_CHANNEL)])
def test_bytes_by_hand(name, format):
    pytest.importorskip("transformers")
    found = moeopt.inspect(CONFIG, quantize=name, device="H100-SXM").to_dict()
    told = found["quantized"]
    each = 2 * format.nbytes((48, 64)) + format.nbytes((64, 48))
    assert told["experts_bytes"] == 2 * 8 * each and told["format"] == name
    weights = 2 * 8 * 3 * 48 * 64
    assert told["experts_bytes_before"] == 2 * weights
    assert told["bits_per_weight"] == pytest.approx(8 * told["experts_bytes"] / weights)
    assert told["memory"]["bytes"] == told["experts_bytes"] + 2 * (found["params"]["total"] - weights)
    before, after = found["per_token"]["decode"]["parts"], told["decode"]["parts"]
    assert after["experts"]["bytes"] < 0.6 * before["experts"]["bytes"]
    assert after["other"] == before["other"] and told["decode"]["seconds_at_least"] > 0
    assert moeopt.inspect(CONFIG, device="H100-SXM").to_dict()["quantized"] is None


def test_the_words(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code, out, _ = run(capsys, tmp_path, "--quantize", "mxfp4", "--device", "H100-SXM")
    text = " ".join(out.split())
    assert code == 0
    for words in (
        "with the experts in mxfp4 (e2m1, one e8m0 scale per 1 x 32), the rest at 16 bits", "bits a weight,",
        "whole model", "fits H100-SXM", "a decoding step reads", "times what 16 bits allow",
    ):  # fmt: skip
        assert words in text, words
    code, _, err = run(capsys, tmp_path, "--quantize", "int3")
    assert code == 2 and "quantize='int3' is no format of experts: use one of int8," in " ".join(err.split())


def test_a_model_without_experts():
    with pytest.raises(UsageError, match="no mixture of experts was found"):
        moeopt.inspect(nn.Linear(4, 4), quantize="int4")


def test_biases_keep_their_width():
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 4, bias=False)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4)
            )

        def forward(self, x):
            w, ids = self.gate(x).softmax(-1).topk(2, -1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                t, k = torch.where(ids == e)
                out = out.index_add(0, t, expert(x[t]) * w[t, k, None])
            return out

    told = moeopt.inspect(Bank(), quantize="int4", bits=32, top_k=2).to_dict()["quantized"]
    codes = INT4_BLOCK32.nbytes((64, 32)) + INT4_BLOCK32.nbytes((32, 64))
    assert told["experts_bytes"] == 4 * (codes + 4 * (64 + 32))
