"""Versions: an untested one is told once and does not stop anything; the documentation's table is what was run."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from moeopt import compat
from moeopt.errors import UntestedVersionWarning
from tests.matrix import run as matrix

ROOT = Path(__file__).parents[1]
RUNS = json.loads((ROOT / "tests" / "matrix" / "results.json").read_text())


@pytest.mark.parametrize(("version", "word"), [("2.99.1+cpu", "newer"), ("3.0.0", "newer"), ("2.9.1", "older")])
def test_an_untested_torch_is_a_warning_once(version, word, monkeypatch):
    monkeypatch.setattr(compat, "_told", set())
    with pytest.warns(
        UntestedVersionWarning, match=rf"torch {re.escape(version)} is {word} than what moeopt was tested"
    ):
        compat.tell_untested_torch(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.tell_untested_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu"])
def test_a_tested_torch_is_not_told(version):
    assert compat.untested("torch", version) == ""


def test_options_that_a_version_lacks_are_left_out():
    @dataclasses.dataclass
    class Old:
        dynamic: bool = False

    assert compat.known_fields(Old, dynamic=True, ort_fusions="cpu") == {"dynamic": True}


def test_a_constant_is_marked_as_torch_marks_it():
    def one():
        return 1

    def other():
        return 1

    assert vars(compat.constant_when_compiled(one)) == vars(torch.compiler.assume_constant_result(other)) != {}


def test_what_is_said_to_be_tested_was_run():
    for library, ends in compat.TESTED.items():
        ran = {tuple(map(int, run[library].split("+")[0].split(".")[:2])) for run in RUNS}
        assert set(ends) <= ran, f"{library}: run `make test-matrix`, or narrow moeopt.compat.TESTED"


def test_pyprojects_ranges_begin_where_the_runs_do():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={".".join(map(str, compat.TESTED["torch"][0]))}"' in text
    oldest = min(tuple(map(int, run["transformers"].split(".")[:2])) for run in RUNS)
    assert f'transformers = ["transformers>={".".join(map(str, oldest))}' in text


def test_the_table_of_the_documentation_is_the_runs():
    page = (ROOT / "docs" / "start.md").read_text()
    for run in RUNS:
        row = f"| {run['torch']} | {run['transformers']} | {run['onnxruntime']} | {run['python']} | "
        assert row + f"{run['passed']} passed, {run['failed']} failed, {run['skipped']} skipped |" in page


def test_a_corner_without_its_python_is_left_out_with_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "PYTHONS", {"newest-python": "3.99"})
    assert matrix.environment("newest-python", None) is None and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "newest-python: left out, there is no Python 3.99 on this machine\n"


def test_a_python_that_only_says_that_it_is_not_there_is_none(monkeypatch, tmp_path):
    shim = tmp_path / "python3.98"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.interpreter("3.98") is None
    there = tmp_path / "versions" / "3.98.1" / "bin" / "python"
    there.parent.mkdir(parents=True)
    there.write_text("#!/bin/sh\n")
    there.chmod(0o755)
    assert matrix.interpreter("3.98") == str(there)


def test_at_night_each_python_of_the_corners_is_set_up():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for version in matrix.PYTHONS.values():
        assert f"            {version}\n" in workflow, f"ci.yml sets up no Python {version}"
