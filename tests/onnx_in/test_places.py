"""Indices that a TopK or the like gives are taken as they are; others may count from the end."""

import numpy as np
import onnx
import pytest

import moeopt
from moeopt.onnx_in.places import from_zero_told
from moeopt.onnx_in.program import NodeStep
from tests.backends.onnxrt.onnx_file.test_by_hand import optimized, right
from tests.onnx_in.by_hand import File


def told(*steps):
    """Which of the steps are given places for indices, by their numbers."""
    made = [NodeStep("", op, "", tuple(reads), tuple(makes), more) for op, reads, makes, more in steps]
    return [number for number, step in enumerate(from_zero_told(made)) if step.attributes.get("from_zero")]


TOP = ("TopK", "sk", ["v", "i"], {})


def moved(op, **more):
    return TOP, (op, ["i", "n"], ["j"], more), ("ScatterElements", "xju", "y", {})


def test_places_stay_places_however_they_are_moved():
    assert told(TOP, ("GatherElements", "xi", "y", {}), ("OneHot", "idv", "z", {})) == [1, 2]
    assert told(*moved("Slice")) == told(*moved("Cast", to=6)) == told(*moved("Unsqueeze")) == [2]
    assert told(("ArgMax", "s", "i", {}), ("Gather", "xi", "y", {})) == [1]


@pytest.mark.parametrize(
    "steps",
    [
        moved("Sub"),
        moved("Cast", to=3),
        (TOP, ("GatherElements", "xv", "y", {})),
        (TOP, ("GatherElements", "ix", "y", {})),
        (("Gather", "xi", "y", {}),),
    ],
    ids=["a difference", "a narrow type", "values", "the table itself", "an input"],
)
def test_other_indices_may_count_from_the_end(steps):
    assert told(*steps) == []


def test_a_file_whose_table_is_scattered_by_a_top_k_has_no_nodes_for_other_ids(tmp_path):
    file = File()
    model = file.model(file.dense())
    found = optimized(model)
    right(model, found)
    found.save(tmp_path / "bundle")
    ops = [node.op_type for node in onnx.load(tmp_path / "bundle" / "model.onnx").graph.node]
    assert not {"Less", "GreaterOrEqual", "And", "Or"} & set(ops)


def test_ids_that_count_from_the_end_still_do():
    file = File()
    weights, ids, logits = file.router()
    turned = file.node("Sub", ids, file.constant(np.int64(4)))
    model = file.model(file.weighed("x", file.table(weights, turned, logits), lambda x, e: file.expert(x, f"e.{e}")))
    right(model, moeopt.optimize(model, verify="off"))
