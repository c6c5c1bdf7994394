"""``moeopt plan`` prints the table or JSON, and refuses with one line."""

import json

import pytest

from moeopt.cli import main

pytest.importorskip("transformers")

CONFIG = {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "hidden_size": 64,
    "moe_intermediate_size": 32, "vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *argv])
    return stop.value.code


def test_the_table(config, capsys):
    assert not run(config, "--devices", "16")
    out = capsys.readouterr().out
    assert "on 16 x H100-SXM (2 nodes of 8), bfloat16" in out and "8 experts on 16 devices: some hold none" in out


def test_json_and_nothing_else(config, capsys):
    assert not run(config, "--devices", "2", "--dtype", "int4", "--json")
    data = json.loads(capsys.readouterr().out)
    assert (data["devices"], data["node"], data["dtype"], data["experts"]) == (2, 2, "int4", 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", "3", "--node", "2"], "devices=3 is no multiple of node=2"),
        (["--devices", "2", "--load", "nowhere.json"], "load='nowhere.json' is no file"),
    ],
)
def test_mistakes_are_one_line(config, capsys, arguments, words):
    assert run(config, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
