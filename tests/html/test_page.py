"""The page: the facts of the report, nothing from the network, every text escaped, every picture in words too."""

import dataclasses
import html.parser
import importlib.util
import json
import os
import re

import pytest

from moeopt.errors import UsageError
from moeopt.report import BlockReport, Report
from tests.html import pages

VOID = {"meta", "br", "img"}


class Page(html.parser.HTMLParser):
    """Elements as (tag, attributes), text by tag, the JSON, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.facts = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), list(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), list(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.facts += data
        elif inside != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    got = pages.report().to_html(path, profile=pages.load(), timings={"original <1>": 0.02, "moeopt": 0.01})
    assert got == path
    return path.read_text()


@pytest.fixture(scope="module")
def page(written):
    return Page(written)


def test_the_facts_are_those_of_the_report(page):
    facts = json.loads(page.facts)
    assert facts["report"] == pages.report().to_dict()
    assert facts["certificate"] == json.loads(json.dumps(pages.certificate().to_dict()))
    assert facts["profile"] == json.loads(pages.load().to_json())
    assert facts["timings"] == {"original <1>": 0.02, "moeopt": 0.01}


def test_what_is_seen_has_every_block_reason_and_figure(page):
    for block in pages.report().blocks:
        for text in (block.name, block.reason, block.lowering, block.router, block.nearest, block.source):
            assert " ".join(text.split()) in page.text
    for text in (
        "4 of 5 blocks rewritten. FAILED",
        "layers.0.mlp ... layers.2.mlp (3 alike)",
        "the engine was not executed: the verdict is that of a replay",
        "KL divergence, max: 1e-09",
        "20 ms",
        "2 calls not counted",
        "no expert fired",
        "Not profiled: odd.",
        "1.50x",
        "beyond the experts",
        "x the mean pair",
    ):
        assert text in page.text, text


def test_hostile_texts_stay_text(page, written):
    assert {tag for tag, _, _ in page.tags} & {"i", "img", "b"} == set()
    assert [tag for tag, _, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes, _ in page.tags for name in attributes)
    assert "<script>alert" not in written and "onerror" not in re.sub(r"&lt;.*?&gt;|\\u003c.*?\\u003e", "", written)


def test_nothing_comes_from_the_network(page, written):
    fetching = {"src", "srcset", "data", "xlink:href", "poster", "action"}
    for _, attributes, _ in page.tags:
        assert not fetching & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    css = re.search(r"<style>(.*?)</style>", written, re.S).group(1)
    assert "url(" not in css and "@import" not in css
    assert "default-src 'none'" in written


def test_every_picture_is_in_words_too(page):
    pictures = [(attributes, i) for i, (tag, attributes, _) in enumerate(page.tags) if tag == "svg"]
    assert len(pictures) >= 8
    for attributes, i in pictures:
        assert attributes["role"] == "img" and attributes["aria-label"]
        assert page.tags[i + 1][0] == "title"


def test_regions_that_scroll_can_be_reached_by_keyboard(page):
    regions = [attributes for _, attributes, _ in page.tags if attributes.get("class") == "scroll"]
    assert regions and all(r["tabindex"] == "0" and r["aria-label"] and r["role"] == "region" for r in regions)
    tables = [i for i, (tag, _, _) in enumerate(page.tags) if tag == "table"]
    assert tables and all(any(t == "th" and a.get("scope") for t, a, _ in page.tags[i : i + 12]) for i in tables)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_a_contrast_of_at_least_4_5(written):
    light, dark = re.findall(r":root \{(.*?)\}", written, re.S)[:2]
    for scheme in (light, dark):
        named = {n: c if len(c) == 7 else "#" + "".join(2 * d for d in c[1:])
                 for n, c in re.findall(r"--(\w+): (#\w+)", scheme)}  # fmt: skip
        pairs = [(text, "bg") for text in ("fg", "soft", "accent", "good", "bad", "warn")]
        pairs += [("fg", under) for under in ("card", "op", "keep", "gone")]
        pairs += [(text, "card") for text in ("good", "bad", "warn")]
        for text, under in pairs:
            high, low = sorted((luminance(named[text]), luminance(named[under])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, under)


def test_sections_without_facts_are_left_out(tmp_path):
    bare = dataclasses.replace(pages.report(), certificate=None, graph=None)
    page = Page(bare.to_html(tmp_path / "a.html").read_text())
    for missing in ("Certificate", "Before and after", "Speed", "Memory", "Expert load"):
        assert missing not in page.text
    assert not [t for t in page.tags if t[0] == "svg"] and "4 of 5 blocks rewritten" in page.text
    assert "No feed-forward or mixture-of-experts block was found" in Page(
        Report(model="Linear").to_html(tmp_path / "b.html").read_text()
    ).text  # fmt: skip


def test_sixty_layers_of_512_experts_stay_small(tmp_path):
    text = pages.load(60, 512, 256).to_html(tmp_path / "big.html").read_text()
    page = Page(text)
    assert len(text) < 5e6 and "each row sorted by load" in page.text
    assert "Expert load of 61 blocks" in page.text and "rank" in page.text


def test_a_page_of_many_experts_reads_none_of_their_pairs(tmp_path):
    """Sixty layers of 512 experts have 16 million: to copy them took all of the page's time."""
    load = pages.load(1, 65, 16)
    without = [dataclasses.replace(layer, together=None) for layer in load.layers]
    other = dataclasses.replace(load, layers=tuple(without))
    assert other.to_html(tmp_path / "a.html").read_text() == load.to_html(tmp_path / "b.html").read_text()
    assert other._repr_html_() == load._repr_html_()


def test_lowerings_that_were_measured_are_bars(tmp_path):
    text = "onnxruntime dense, measured 0.846 ms; next unrolled, measured 1e+03 ms"
    block = BlockReport("0", "moe", "rewritten", lowering=text)
    page = Page(
        Report((block, dataclasses.replace(block, lowering="dense (estimated 2 ms)")))
        .to_html(tmp_path / "a.html")
        .read_text()
    )
    for words in ("0: dense", "0.846 ms", "0: unrolled", "1e+03 ms", "Speed"):
        assert words in page.text
    assert page.text.count("0: ") == 2


def test_memory_bars_come_from_an_inspection(tmp_path):
    import torch

    import moeopt

    found = moeopt.inspect(torch.nn.Linear(4, 4), device="H100-SXM")
    page = Page(pages.report().to_html(tmp_path / "a.html", inspection=found).read_text())
    assert (
        "weights at 4 bits" in page.text
        and "H100-SXM has 80 GB" in page.text
        and json.loads(page.facts)["inspection"] == found.to_dict()
    )


@pytest.mark.parametrize(
    ("path", "options", "text"),
    [
        ("no/such/report.html", {}, "report.html cannot be written: there is no folder"),
        (".", {}, "is a folder: give the name of a file, like"),
        ("a.html", {"timings": {"x": -1}}, "timings['x'] is -1: give the seconds of one call"),
        ("a.html", {"timings": {"x": float("nan")}}, "timings['x'] is nan"),
        ("a.html", {"timings": {"x": "1"}}, "timings['x'] is '1'"),
    ],
)
def test_what_cannot_be_written_is_not(tmp_path, path, options, text):
    with pytest.raises(UsageError) as err:
        pages.report().to_html(tmp_path / path, **options)
    assert text in str(err.value) and not list(tmp_path.iterdir())


def test_without_jinja2_the_way_out_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    with pytest.raises(UsageError, match=r"the HTML report needs jinja2: pip install 'moeopt\[report\]'"):
        pages.report().to_html(tmp_path / "a.html")


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("before")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        pages.report().to_html(path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match=r"No space left on device: free some space, and call again: '.*a\.html'"):
        pages.report().to_html(path)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.html"]
