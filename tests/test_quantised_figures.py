"""The figures of quantised kernels in the documentation are those that were measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_says_what_the_benchmark_wrote():
    measured = json.loads((ROOT / "benchmarks/results/quantised-1t.json").read_text())["milliseconds"]
    page = " ".join((ROOT / "docs/quantised.md").read_text().split())
    figures = re.search(
        r"one token (\S+) and (\S+) ms beside (\S+) of float32, 64 tokens (\S+) and (\S+) ms beside (\S+):", page
    )
    assert figures is not None
    one, many = measured["1"], measured["64"]
    assert list(figures.groups()) == [
        *(f"{one[name]:.1f}" for name in ("int8", "int4", "float32")),
        *(f"{many[name]:.0f}" for name in ("int8", "int4", "float32")),
    ]
