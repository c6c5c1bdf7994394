"""Progress: where a bar is shown and where not, what the logger and a callable get, and that errors end the bar."""

import logging
import sys

import pytest
import torch

import moeopt
from examples.quickstart import TwoOfEight
from moeopt import progress

LINE = "block 2 of 7: layers.1"


def looks(monkeypatch, tty, ci=""):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    monkeypatch.setenv("CI", ci)


@pytest.mark.parametrize(
    ("value", "tty", "ci", "bar"),
    [(None, True, "", True), (None, False, "", False), (None, True, "true", False), (None, True, "0", True),
     (False, True, "", False), (True, False, "true", True)],
)  # fmt: skip
def test_where_a_bar_is_shown(monkeypatch, capsys, value, tty, ci, bar):
    looks(monkeypatch, tty, ci)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.shown(value) as say:
        say(LINE)
    assert ("layers.1" in capsys.readouterr().err) is bar


def test_a_quiet_command_shows_none(monkeypatch, capsys):
    looks(monkeypatch, True)
    with progress.never_by_itself(), progress.shown(None) as say:
        say(LINE)
    assert capsys.readouterr().err == "" and progress.somebody_looks()


def test_a_callable_and_the_logger_get_each_line(caplog):
    model, x = TwoOfEight(8, 16, 4).eval(), torch.randn(2, 3, 8)
    lines = []
    with caplog.at_level(logging.INFO, "moeopt"):
        fast = moeopt.optimize(model, x, verify="fast", progress=lines.append)
    said = [record.message for record in caplog.records if record.name == "moeopt"]
    assert lines == said and lines[0] == "looking for feed-forward and mixture-of-experts blocks"
    assert "block 1 of 1: TwoOfEight" in lines and "comparing the whole model end to end" in lines
    assert fast.report.seconds > 0
    page = fast._repr_html_()
    assert "1 of 1 blocks rewritten" in page and "moeopt certificate: PASSED" in page


def test_a_bar_of_the_callers_own_stays_alone(monkeypatch):
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)), progress.shown(True) as say:
        say(LINE)


def test_every_abbreviation_has_its_key():
    model, x = TwoOfEight(8, 16, 4).eval(), torch.randn(2, 3, 8)
    fast = moeopt.optimize(model, x, verify="fast")
    report, certificate = " ".join(str(fast.report).split()), " ".join(str(fast.certificate).split())
    assert "key: W_in, W_out: an expert's first and second weight, oi: stored (outputs, inputs)" in report
    for words in (
        "orig, new: worst distance",
        "f64: that of",
        "factor: needed",
        "ids: expert choices",
        "tie: ",
        "flip: ",
    ):
        assert words in certificate
    assert "what passed: 1 rewritten block, and the whole model end to end" in certificate
    off = str(moeopt.optimize(model, x, verify="off").certificate)
    assert "0.0e+00" not in off


def test_a_headline_says_what_passed():
    from moeopt.html.page import what_passed

    good = {"passed": True, "blocks": [{}], "end_to_end": {}}
    assert what_passed(good | {"end_to_end": {"x": 1}}, 6) == (
        ": what was rewritten and the whole model; the other 6 run the original code"
    )
    assert what_passed(good, 1) == ": what was rewritten; the other 1 runs the original code"
    assert what_passed({**good, "passed": None}, 1) == ""
