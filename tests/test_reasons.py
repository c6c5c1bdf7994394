"""docs/reasons.md: each program there is declined for the reason that stands above it, at a line of the program."""

import linecache
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import moeopt

PAGE = Path(__file__).parents[1] / "docs" / "reasons.md"
CODE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
INTRODUCTION, *SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.M)


def start() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(CODE.search(INTRODUCTION)[1], PAGE.name, "exec"), names)
    return names


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.splitlines()[0])
def test_the_program_is_declined_for_the_reason_of_the_page(section):
    quoted = " ".join(line.removeprefix("> ") for line in re.findall(r"^>.*", section, re.M))
    assert quoted and re.search(r"^Way out: \w", section, re.M)
    names = start()
    torch.manual_seed(0)
    code = CODE.search(section)[1]
    linecache.cache[PAGE.name] = (len(code), None, code.splitlines(keepends=True), PAGE.name)  # as in a file
    exec(compile(code, PAGE.name, "exec"), names)
    (block,) = [b for b in moeopt.explain(names["model"].eval(), names["x"], verify="fast").blocks if b.kind == "moe"]
    assert block.status == "declined"
    pattern = ".*".join(re.escape(part) for part in quoted.split("..."))
    assert re.fullmatch(pattern, block.reason), f"{block.reason!r} is not {quoted!r}"


def test_the_block_that_the_programs_change_is_rewritten():
    names = start()
    (block,) = [b for b in moeopt.explain(names["Moe"]().eval(), names["x"], verify="fast").blocks if b.kind == "moe"]
    assert block.status == "rewritten", block.reason
