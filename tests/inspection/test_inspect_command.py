"""``moeopt inspect``: exit codes, one message per failure, JSON that parses."""

import json

import pytest

from moeopt.cli import main
from tests.inspection.test_bad_input import TINY, write


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *map(str, argv)])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


def test_table_and_json(capsys, tmp_path):
    path = write(tmp_path / "config.json", TINY)
    code, out, _ = run(capsys, path, "--device", "H100", "--batch", "8")
    assert code == 0 and "4 experts, top-2" in out and "decode, T=8" in out
    code, out, _ = run(capsys, tmp_path, "--device", "H100", "--json")
    assert code == 0 and json.loads(out)["params"]["total"] > 0


def test_a_factory(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))\n")
    code, out, _ = run(capsys, f"{path}:make", "--device", "H100")
    assert code == 0 and "no mixture of experts found" in out


def test_exit_codes(capsys, tmp_path):
    code, out, err = run(capsys, tmp_path, "--device", "H100")
    assert code == 2 and not out and err.startswith(f"moeopt: {tmp_path} has neither config.json nor weights")
    write(tmp_path / "config.json", TINY)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    code, out, err = run(capsys, tmp_path, "--device", "H100")
    assert code == 1 and not out and "model.safetensors is damaged" in err and err.count("\n") == 1
