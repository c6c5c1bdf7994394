"""Files that ONNX Runtime ends the process over where an input has no elements."""

import pytest
import torch
from onnx import TensorProto, helper

import moeopt
from moeopt.backends.onnxrt import without_elements
from moeopt.errors import UsageError
from tests.onnx_in.by_hand import E, File, H


def gru(file):
    columns = file.node("Unsqueeze", "x", file.constant([1]))
    _, last = file.node("GRU", columns, file.weight(1, 3 * H, H), file.weight(1, 3 * H, H), results=2, hidden_size=H)
    return file.node("Squeeze", last, file.constant([0]))


def looked_up(file):
    """A product of each row's own batch."""
    weights, ids, _ = file.router()
    own = file.node("Gather", file.weight(E, H, 6), ids)
    return file.node("Einsum", "x", own, weights, equation="th,tkho,tk->to")


@pytest.mark.parametrize("make", [gru, looked_up])
def test_a_call_that_ends_the_process_is_an_error(make, tmp_path):
    file = File()
    model = file.model(make(file))
    found = moeopt.optimize(model)
    said = (
        r"ONNX Runtime .* ends the process that runs the file on these sizes \(signal \d+, in a process of its own\): "
    )
    said += r"x \(0, 8\); give inputs without a size of 0"
    with pytest.raises(UsageError, match=said):
        moeopt.optimize(model, torch.zeros(0, H))
    assert moeopt.verify(found.save(tmp_path / "out"), original=model, inputs=torch.ones(3, H)).passed
    with pytest.raises(UsageError, match=said):
        moeopt.verify(tmp_path / "out", original=model, inputs=torch.zeros(0, H))


def test_a_call_that_ends_the_process_is_an_error_of_the_engine(tmp_path):
    """Of one whose experts were rewritten, behind nodes that stay; and of the bundle that is loaded."""
    file = File()
    columns = file.node("Unsqueeze", "x", file.constant([1]))
    every, _ = file.node("GRU", columns, file.weight(1, 3 * H, H), file.weight(1, 3 * H, H), results=2, hidden_size=H)
    rows = file.node("Squeeze", every, file.constant([1, 2]))
    table = file.table(*file.router(x=rows))
    found = moeopt.optimize(file.model(file.weighed(rows, table, lambda x, e: file.expert(x, f"e.{e}"))), verify="off")
    assert [b.status for b in found.report.blocks] == ["rewritten"]
    said = (
        r"ONNX Runtime .* ends the process that runs this graph on these sizes \(signal \d+, in a process of its own\)"
        r": x \(0, 8\); answer a call without elements without the engine"
    )
    for engine in (found, moeopt.load(found.save(tmp_path / "out"))):
        with pytest.raises(UsageError, match=said):
            engine(x=torch.zeros(0, H))
        assert engine(x=torch.zeros(2, H)).shape == (2, H)


def test_a_kind_of_call_is_tried_once_and_only_on_nodes_that_may_end_it(monkeypatch):
    tried = []
    monkeypatch.setattr(without_elements, "ended_by", lambda *given: tried.append(given))
    file = File()
    plain = moeopt.optimize(file.model(file.dense()), verify="off")
    assert plain(x=torch.zeros(0, H)).shape == (0, H) and not tried
    file = File()
    rows = file.node("Einsum", "x", file.weight(H, H), equation="th,ho->to")
    table = file.table(*file.router(x=rows))
    found = moeopt.optimize(file.model(file.weighed(rows, table, lambda x, e: file.expert(x, f"e.{e}"))), verify="off")
    for _ in range(2):
        assert found(x=torch.zeros(0, H)).shape == (0, H)
    assert len(tried) == 1


def test_a_call_without_rows_that_the_file_takes_is_none():
    file = File()
    model = file.model(file.dense())
    past = helper.make_tensor_value_info("past", TensorProto.FLOAT, ["old", H])
    model.graph.input.append(past)
    joined = helper.make_node("Concat", ["past", "x"], ["every"], axis=0)
    for node in model.graph.node:
        node.input[:] = ["every" if name == "x" else name for name in node.input]
    model.graph.node.insert(0, joined)
    feeds = {"x": torch.randn(5, H), "past": torch.zeros(0, H)}
    assert [(b.status, b.reason) for b in moeopt.optimize(model, feeds, verify="off").report.blocks] == [
        ("rewritten", "")
    ]
