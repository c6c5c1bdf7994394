"""Notebook tables: the same facts, escaped, short."""

import pytest
import torch

import moeopt
from moeopt.html.names import short_names
from moeopt.report import BlockReport, Report
from tests.html import pages
from tests.html.test_page import Page


@pytest.mark.parametrize(
    ("thing", "texts"),
    [
        (pages.report(), ("Toy<i>, 4 of 5 blocks rewritten", pages.HOSTILE, pages.REASON, "2.0e-07")),
        (pages.certificate(), ("moeopt certificate: FAILED", pages.HOSTILE, "FAILED", "not run", pages.REASON)),
        (pages.load(), (pages.HOSTILE, "1.50x", f"not profiled: {pages.REASON}", "Toy<i>, 3 batches")),
        (moeopt.inspect(torch.nn.Linear(4, 4), device="H100-SXM"), ("Linear", "parameters", "20", "weights at 4 bits")),
    ],
    ids=["report", "certificate", "load", "inspection"],
)
def test_a_notebook_shows_the_facts(thing, texts):
    page = Page(thing._repr_html_())
    assert {tag for tag, _, _ in page.tags} == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    for text in texts:
        assert text in "".join(page.words)


def test_long_tables_end_with_what_is_left_out():
    report = Report(tuple(BlockReport(f"b{i}", "moe", "rewritten") for i in range(50)))
    text = report._repr_html_()
    assert "b39" in text and "b40" not in text and "and 10 more: print it to see all" in text


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], ["layers.0", "layers.1"]),
        (["a", "a.b"], ["a", "a.b"]),
        (["original", "moeopt"], ["original", "moeopt"]),
        (["one"], ["one"]),
        (["x", "x"], ["x", "x"]),
    ],
)
def test_names_beside_a_picture_keep_what_tells_them_apart(names, short):
    assert short_names(names) == short
