"""The scripts of benchmarks/ can be imported: what they use of the package is there."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_a_script_finds_what_it_uses(path):
    importlib.import_module(".".join(path.with_suffix("").parts))
