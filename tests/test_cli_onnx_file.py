"""The command on an ONNX file: optimised and saved, explained, verified; without experts it is left alone and good."""

import json

import pytest

from moeopt.cli import main
from tests.onnx_in.hit_loops import hit_loop
from tests.onnx_in.toys import export, toy_lm


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return hit_loop("all", tmp_path_factory.mktemp("cli") / "home.onnx", 5)


def command(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, words)])
    told = capsys.readouterr()
    return stopped.value.code or 0, told.out, told.err


def test_a_file_is_optimised_saved_and_verified(home, tmp_path, capsys):
    out = tmp_path / "out"
    code, told, _ = command(capsys, "optimize", home, "--out", out, "--verify", "fast", "--json")
    body = json.loads(told)
    assert code == 0 and body["saved"] == str(out) and body["report"]["backend"] == "onnxruntime"
    assert [b["status"] for b in body["report"]["blocks"]] == ["rewritten"]
    assert (out / "model.onnx").is_file()
    assert command(capsys, "verify", out)[0] == 0
    assert command(capsys, "verify", out, "--original", home)[0] == 0


def test_explain_says_what_would_be_rewritten(home, capsys):
    code, told, _ = command(capsys, "explain", home)
    assert code == 0 and "experts: MoE, 8 experts, top-2" in told


def test_a_file_without_experts_is_good_and_said_so(tmp_path, capsys):
    path = export(toy_lm("plain", layers=1), tmp_path / "plain.onnx")
    code, told, _ = command(capsys, "optimize", path, "--out", tmp_path / "out")
    assert code == 0 and "there is no block of experts in the file: it is left as it is" in " ".join(told.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "torch"], "an ONNX file is optimised for ONNX Runtime: leave out backend='torch'"),
        (["--task", "text-generation"], "--task says how a Hugging Face model is loaded"),
        (["--dtype", "float16"], "an ONNX file keeps its dtype"),
    ],
)
def test_words_that_do_not_fit_a_file_are_told(home, words, said, capsys):
    code, _, told = command(capsys, "optimize", home, *words)
    assert code == 2 and said in " ".join(told.split()) and "Traceback" not in told


def test_a_damaged_file_is_told_in_one_message(tmp_path, capsys):
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x09\x12")
    code, _, told = command(capsys, "optimize", tmp_path / "cut.onnx")
    assert code == 2 and "it is not an ONNX graph" in told and "Traceback" not in told
