"""Each line of docs/limits.md is met by programs: the page may not say what no test shows."""

import importlib
import re

import pytest

from tests.limits import LIMITS, ROOT

PAGE = ROOT / "docs" / "limits.md"
for part in ("declined", "living", "unseen", "engines"):
    importlib.import_module(f"tests.limits.{part}")
MORE_OF_A_KIND = {("Experts that run several times in one forward", 1)}
"""Chunks of 4 tokens: as the loop over the batch before it, with a hundred times as many products to read."""
PROGRAMS = [
    pytest.param(words, i, marks=pytest.mark.nightly if (words, i) in MORE_OF_A_KIND else (), id=f"{words} {i}")
    for words, programs in LIMITS.items()
    for i in range(len(programs))
]


def lines() -> list[str]:
    """The bold words of each line; a line without is an error."""
    found = []
    for line in PAGE.read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.match(r"- \*\*(.+?)\*\*", line)
            assert match, f"no bold words by which a test can name it: {line}"
            found.append(match[1])
    return found


def test_each_line_has_programs():
    found = lines()
    assert len(set(found)) == len(found), "two lines of one name"
    assert set(found) == set(LIMITS)


def test_the_page_is_short():
    """It was 5,614 bytes and 1,004 words once: what explains a limit stands in the other pages."""
    text = PAGE.read_text()
    assert len(text) < 5614 and len(text.split()) < 1004


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant checkpoints
@pytest.mark.filterwarnings("ignore:The tensor attributes self.fn.lstm")  # by torch.export
@pytest.mark.filterwarnings("ignore:`torch.jit.trace. is deprecated")
@pytest.mark.parametrize(("words", "i"), PROGRAMS)
def test_the_limit_is_met(words, i, tmp_path):
    LIMITS[words][i](tmp_path)
