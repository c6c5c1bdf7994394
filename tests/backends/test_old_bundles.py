"""Bundles of schema 1 that an earlier moeopt saved load here, and verify."""

import json
from pathlib import Path

import pytest

import moeopt

SAVED = Path(__file__).parents[1] / "fixtures" / "bundles"


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_bundle_of_schema_1_loads_and_verifies(backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    assert json.loads((SAVED / backend / "moeopt.json").read_text())["schema"] == 1
    assert callable(moeopt.load(SAVED / backend))
    assert moeopt.verify(SAVED / backend).passed
