"""The table that the documentation shows is the one that is printed."""

from pathlib import Path

import pytest

import moeopt
from tests.inspection.published import SHAPES

pytest.importorskip("transformers", "5.0")


def test_the_documentation_shows_what_is_printed():
    found = moeopt.inspect(SHAPES["Qwen3-30B-A3B"].fields, device="H100-SXM", batch=8)
    assert f"```\n{found}\n```" in (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
