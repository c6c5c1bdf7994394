"""The report: its laws, its layout within 80 columns, and JSON both ways."""

import dataclasses
import io
import math

import pytest

from moeopt.errors import UsageError
from moeopt.report import WIDTH, BlockReport, Report

REWRITTEN = BlockReport(
    "model.layers.0.mlp",
    "moe",
    "rewritten",
    experts=8,
    router="softmax, top-2 of 8, renormalised",
    lowering="moeopt::experts",
    error=1.25e-7,
    top_k=2,
    spec="silu GLU, rows gate|up",
    seconds=0.5,
)
DECLINED = BlockReport(
    "model.layers.1.mlp",
    "dense_ffn",
    "declined",
    "a dense FFN runs as one matmul already, so rewriting it would not pay; " * 3,
    source="toy.py:12",
    nearest="one expert that saw every token",
)


def test_text_groups_and_fits_80_columns():
    text = str(Report((REWRITTEN, DECLINED), model="ToyMoE", backend="torch", seconds=1.23, notes=("seed 0",)))
    lines = text.splitlines()
    assert lines[0] == "moeopt: ToyMoE on torch"
    assert lines[1] == "2 blocks found: 1 rewritten, 1 declined (1.2 s)"
    assert lines.index("rewritten") < lines.index("declined")
    assert "  model.layers.0.mlp: MoE, 8 experts, top-2" in lines
    assert "    error   1.2e-07 from the float64 oracle, worst token" in lines
    assert "    source  toy.py:12" in lines and "note: seed 0" in lines
    assert all(len(line) <= WIDTH for line in lines)


def test_long_reasons_wrap_under_their_label():
    lines = str(Report((DECLINED,))).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    why     a dense FFN"))
    assert lines[start + 1].startswith(" " * 12) and lines[start + 1].strip()


def test_long_words_are_broken_and_nothing_is_cut():
    name, path = "model." + "decoder_of_the_second_stage." * 6 + "mlp", "/site-packages" * 8 + "/model.py:12"
    block = dataclasses.replace(DECLINED, name=name, source=path, reason="x" * 200)
    lines = str(Report((block,), model="M" * 100)).splitlines()
    assert max(map(len, lines)) <= WIDTH
    whole = "".join(line.strip() for line in lines)
    for text in (name, path, "x" * 200, "M" * 100):
        assert text in whole


def test_blocks_that_differ_in_their_number_only_fold():
    blocks = tuple(
        dataclasses.replace(REWRITTEN, name=f"model.layers.{i}.mlp", error=i * 1e-7, seconds=i) for i in range(4)
    )
    other = dataclasses.replace(REWRITTEN, name="model.layers.9.mlp", lowering="mm loop")
    text = str(Report(blocks + (other,)))
    assert "5 blocks found: 5 rewritten, 0 declined" in text
    assert "model.layers.0.mlp ... model.layers.3.mlp (4 alike): MoE" in text
    assert "3.0e-07" in text and "  model.layers.9.mlp: MoE" in text
    assert text.count("runs as") == 2


def test_empty_report():
    assert str(Report(model="Linear")) == "moeopt: Linear\n0 blocks found: 0 rewritten, 0 declined"


def test_rich_shows_the_same_words():
    from rich.console import Console

    report = Report((REWRITTEN, DECLINED), model="ToyMoE", backend="torch")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    assert [line.rstrip() for line in console.export_text().splitlines()] == str(report).splitlines()


def test_json_round_trip():
    report = Report((REWRITTEN, DECLINED), model="ToyMoE", backend="torch", seconds=2.0, notes=("a", "b"))
    assert Report.from_json(report.to_json()) == report
    assert report.to_dict()["blocks"][0]["experts"] == 8


def test_a_non_finite_error_survives_json():
    report = Report((dataclasses.replace(REWRITTEN, error=math.inf),))
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (("m", "attention", "rewritten"), "block 'm': kind is 'attention', not moe or dense_ffn"),
        (("m", "moe", "maybe"), "block 'm': status is 'maybe', not rewritten or declined"),
        (("m", "moe", "declined"), "block 'm' is declined without a reason"),
        (("m", "moe", "declined", "  "), "block 'm' is declined without a reason"),
        (("m", "moe", "rewritten", "why"), "block 'm' is rewritten and has a reason to decline: 'why'"),
    ],
)
def test_the_law_of_a_block(fields, text):
    with pytest.raises(UsageError) as err:
        BlockReport(*fields)
    assert text in str(err.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a report: Expecting"),
        ("[]", "not a report of schema 1 (found None)"),
        ('{"schema": 2}', "not a report of schema 1 (found 2): written by another moeopt?"),
        ('{"schema": 1}', "not a report: 'blocks'"),
        ('{"schema": 1, "blocks": [{"nam": 1}]}', "unexpected keyword argument 'nam'"),
        ('{"schema": 1, "blocks": [3]}', "not a report"),
    ],
)
def test_what_is_not_a_report_is_refused(text, message):
    with pytest.raises(UsageError) as err:
        Report.from_json(text)
    assert message in str(err.value)
