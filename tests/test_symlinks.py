"""The root symlinks are for reading; importing through one is refused with the way out."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_root_symlink_points_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink() and link.resolve() == ROOT / "moeopt" / name
    assert not link.readlink().is_absolute()


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_import_through_the_symlink_says_what_to_import(name):
    out = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1
    assert f"import moeopt.{name}, not {name}" in out.stderr


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_the_full_name_imports(name):
    subprocess.run([sys.executable, "-c", f"import moeopt.{name}"], cwd=ROOT, check=True)
