"""``moeopt profile`` and ``--html``: words in, files and exit codes out."""

import json
import sys

import pytest

from moeopt.cli import main
from tests.backends.torch.toys import save
from tests.toy_moe import build, seeded

FACTORY = """
import torch
from torch import nn
from tests.toy_moe import Block, build, seeded
from tests.profiling.test_profile import PerSequence

def model():
    return build(), seeded(2, 8, 16)

def declined():
    return build(PerSequence), seeded(2, 8, 16)

def dense():
    return nn.Linear(16, 16).eval(), seeded(2, 16)

def data():
    return (seeded(1, n, 16) for n in (3, 5))
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    path = tmp_path / "profiled_models.py"
    path.write_text(FACTORY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    sys.modules.pop("profiled_models", None)


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


def test_profile_prints_counts_and_writes_a_page(capsys, models, tmp_path):
    page = tmp_path / "load.html"
    code, out, err = run(capsys, "profile", f"{models}:model", "--html", page)
    assert code == 0 and "1 batch, 16 tokens; 1 block profiled, 0 not" in out and f"html: {page}" in out
    assert "batch 1" in err and "Expert load of 1 block" in page.read_text()


def test_profile_of_given_data_as_json(capsys, models):
    code, out, err = run(
        capsys, "profile", f"{models}:model", "--data", f"{models}:data", "--json", "-q", "--no-measure"
    )
    (layer,) = json.loads(out)["layers"]
    assert (code, err, layer["calls"], layer["tokens"], layer["cost"]) == (0, "", 2, 8, None)


def test_random_tokens_are_said_to_be_random(capsys, monkeypatch, tmp_path):
    given = build(), seeded(2, 8, 16)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("moeopt.cli.profile_command.load_target", lambda *args, **fields: given)
    code, out, _ = run(capsys, "profile", tmp_path, "-q", "--no-measure")
    assert code == 0 and out.endswith("note: the inputs are random tokens: --data names your own\n")


def test_a_bundle_is_refused_with_the_way_out(capsys, tmp_path):
    save(tmp_path / "bundle")
    code, _, err = run(capsys, "profile", tmp_path / "bundle")
    assert code == 2 and "is a bundle, whose graph hides its routing: profile the model that it was made of" in err


def test_a_model_whose_blocks_are_all_declined_is_exit_code_1(capsys, models):
    code, out, err = run(capsys, "profile", f"{models}:declined", "-q")
    assert code == 1 and "not profiled: PerSequence" in out and err == "moeopt: no block could be profiled\n"


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["profile", "{file}:dense"], 2, "Linear has no mixture-of-experts block (nothing was found)"),
        (
            ["profile", "{file}:model", "--data", "nothing"],
            2,
            "--data nothing: give module:function or file.py:function",
        ),
        (["profile", "{file}:model", "--data", "{file}:absent"], 2, "has no function 'absent'"),
        (["profile", "{file}:model", "--html", "{dir}/no/a.html"], 2, "a.html cannot be written: there is no folder"),
        (["explain", "{file}:model", "--html", "{dir}"], 2, "is a folder: give the name of a file"),
        (
            ["optimize", "{file}:model", "--measure"],
            2,
            "--measure adds to the page of --html, and compares like with like",
        ),
        (["optimize", "{file}:model", "--html", "{dir}/no/a.html"], 2, "a.html cannot be written: there is no folder"),
    ],
)
def test_wrong_words(capsys, models, argv, code, text):
    words = [a.format(file=models, dir=models.parent) for a in argv]
    got, out, err = run(capsys, *words, "-q")
    assert (got, out) == (code, "") and err.startswith("moeopt: ") and text in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["optimize", "explain"])
def test_the_report_of_a_command_as_a_page(capsys, models, tmp_path, command):
    page, measure = tmp_path / "report.html", ["--measure"] if command == "optimize" else []
    code, out, _ = run(capsys, command, f"{models}:model", "--html", page, "-q", *measure)
    text = page.read_text()
    assert code == 0 and out.endswith(f"html: {page}\n")
    assert "1 of 1 block rewritten. PASSED" in text and "as captured: " in text and "moeopt::experts (4 experts" in text
    facts = json.loads(text.split('id="facts">')[1].split("</script>")[0])
    assert facts["report"]["graph"]["captured"]["branches"] == 4
    assert facts["certificate"]["passed"] is True
    if measure:
        assert list(facts["timings"]) == ["original", "moeopt on torch"] and min(facts["timings"].values()) > 0
        assert "weights at 16 bits" in text and facts["inspection"]["experts"] == 4
    else:
        assert facts["timings"] is None and facts["inspection"] is None
