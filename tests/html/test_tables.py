"""Notebook tables: the same facts, escaped, short."""

import pytest
import torch

import moeopt
from moeopt.html.names import short_names
from moeopt.report import BlockReport, Report
from moeopt.verification.certificate import Certificate
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


LOSS = {
    "kl_mean": 0.02, "top1": 0.9, "tokens": 9, "sequences": 3, "data": "the example inputs", "limit": {"kl_mean": 0.01},
    "missed": [f"kl_mean is 0.02 {pages.HOSTILE}"], "standard_errors": {"kl_mean": 0.004},
    "reference": {"kl_mean": 1e-4}, "nearest": {"kl_mean": 0.0373},
    "blocks": [
        {"name": pages.HOSTILE, "format": "int4", "bytes": 20, "float_bytes": 160, "figures": {"kl_mean": 0.015},
         "ids_compared": 64, "ids_differ": 3},
    ],
}  # fmt: skip


def test_a_loss_is_a_table_of_its_own_and_a_section_of_the_page(tmp_path):
    checks = pages.certificate().blocks[1:2]
    certificate = Certificate(checks, quantized={"layers.1.mlp": "int4"}, loss=LOSS)
    report = Report((BlockReport("layers.1.mlp", "moe", "rewritten"),), "Toy", certificate=certificate)
    shown = "".join(Page(certificate._repr_html_()).words)
    written = report.to_html(tmp_path / "page.html").read_text()
    page = "".join(Page(written).words)
    for text in ("0.02", "0.004", "0.0373", "0.0001", "0.01", "KL divergence of the next-token distributions, mean"):
        assert text in shown and text in page, text
    for text in (
        pages.HOSTILE,
        "3 of 64",
        "160",
        "Limit missed: kl_mean is 0.02",
        "LIMIT MISSED: what quantising lost",
    ):
        assert text in page, text
    assert pages.HOSTILE not in written


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
