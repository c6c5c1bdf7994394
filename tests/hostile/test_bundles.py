"""Bundles from strangers: each command refuses each of them with one message, in time and within its memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

import moeopt
from tests.hostile.edits import GOOD, Made
from tests.hostile.made import made
from tests.hostile.mutants import mutants

ROOT = Path(__file__).parents[2]
COMMANDS = ("load", "verify", "info")
ALL = made()
IN_CI = 20


def tried(jobs: list[list[str]], module: str = "tests.hostile.zygote") -> list[dict[str, Any]]:
    """What came of each job, in a process that has no other."""
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(jobs), text=True, capture_output=True, cwd=ROOT, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(some: list[Made], folder: Path, by_turns: bool = False) -> None:
    """Each command on each of them; ``by_turns`` leaves one to ``load`` and the next to ``info``, and all to verify."""
    jobs = []
    for n, (name, base, change) in enumerate(some):
        bundle = shutil.copytree(GOOD / base, folder / str(n))
        change(bundle)
        commands = ("verify", ("load", "info")[n // 2 % 2]) if by_turns else COMMANDS
        jobs += [[f"{base}: {name}", str(bundle), command] for command in commands]
    results = tried(jobs)
    assert len(results) == len(jobs)
    for result in results:
        where = f"{result['name']}, {result['what']}: {result['ended']} {result['err']}"
        assert result["code"] in (0, 1), where
        assert "\x1b" not in result["out"] + result["err"], where
        said = [line for line in result["err"].splitlines() if line.startswith("moeopt: ")]
        assert len(said) == (result["code"] == 1), where
        if result["what"] == "verify":
            assert result["code"] == 1, f"accepted: {where}"


def test_at_least_300_of_them():
    assert len(ALL) >= 300 and len({(name, base) for name, base, _ in ALL}) == len(ALL)


def test_a_sample_of_hostile_bundles(tmp_path):
    check(ALL[:: len(ALL) // IN_CI], tmp_path, by_turns=True)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(8))
def test_every_hostile_bundle(tmp_path, part):
    check(ALL[part::8], tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("base", ["torch", "onnxruntime"])
def test_every_leaf_replaced_by_wrong_values(tmp_path, base):
    """Of the JSON of a bundle; where a value means nothing to moeopt the bundle still is what it was."""
    results = tried([[base, str(tmp_path)]], "tests.hostile.mutants")
    assert len(results) > 500
    assert not [result for result in results if result["ended"]]


def test_the_first_leaves_replaced_by_wrong_values(tmp_path):
    results = tried([["torch", str(tmp_path), "40"]], "tests.hostile.mutants")
    assert len(results) == 40 and not [result for result in results if result["ended"]]


def test_mutants_are_many():
    assert len(list(mutants(GOOD / "torch"))) > 500


@pytest.mark.parametrize("base", ["torch", "onnxruntime"])
def test_bundles_of_the_first_schema_still_load_and_verify(base):
    """They were written before the limits, the schemas and the list of ops."""
    import torch

    engine = moeopt.load(GOOD / base)
    assert engine(torch.zeros(2, 3, 8), torch.ones(2, 3))["x"].shape == (2, 3, 8)
    assert moeopt.verify(GOOD / base).passed is True
