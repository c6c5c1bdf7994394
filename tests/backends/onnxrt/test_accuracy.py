"""The table of what kernels give is the installed runtime's, and every kernel that is not right has another form."""

import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from moeopt.backends.onnxrt import accuracy
from moeopt.lower.onnx.accurate import FORMS

TABLE = accuracy.table()["cpu"]


@pytest.fixture(scope="module")
def measured():
    return accuracy.measure("cpu")


def test_the_installed_version_gives_what_the_table_says(measured):
    """On a machine with other vector instructions too: what depends on them ("denormal", "worst") is not compared."""
    known = TABLE.get(accuracy.version())
    assert known, f"onnxruntime {accuracy.version()} was not measured: python benchmarks/onnx_accuracy.py --write"
    assert measured.keys() == known.keys()
    differ = {n: (row, known[n]) for n, row in measured.items() if any(row[c] != known[n][c] for c in accuracy.CLASSES)}
    assert not differ


@pytest.mark.parametrize("version", TABLE)
def test_what_is_not_right_has_another_form_or_is_refused(version):
    wrong = {name for name, row in TABLE[version].items() if not accuracy.right(row)}
    refused = {name for name in wrong if accuracy.coarse(one(name), "cpu")}
    assert wrong - FORMS.keys() - accuracy.REPLACED.keys() - refused == set()
    assert accuracy.REPLACED.keys() - wrong <= ({"TopK"} if version != "1.31" else set())


def test_measuring_tells_a_coarse_kernel_from_a_good_one(measured):
    assert not measured["Sigmoid"]["accurate"] and measured["Sigmoid"]["breaks"][0] < -18
    assert not measured["ReduceMax"]["nan"] and not measured["ReduceSum(int64)"]["accurate"]
    assert all(accuracy.right(measured[name]) for name in ("Exp", "Log", "Softplus", "Softmax", "Erf", "Mod(int64)"))


def test_a_version_that_passes_over_nan_is_told(monkeypatch):
    from tests.backends.onnxrt.toys import optimized

    monkeypatch.setattr(accuracy, "version", lambda: "1.31")
    opt, sentence = optimized(), "ONNX Runtime 1.31 passes over scores of a router that are NaN"
    for notes in (opt.report.notes, opt.certificate.notes, opt.model.notes):
        assert sum(note.startswith(sentence) for note in notes) == 1
    assert accuracy.version_notes("cuda") == []  # not measured
    monkeypatch.setattr(accuracy, "version", lambda: "1.32")
    assert accuracy.version_notes("cpu") == []


def one(op, dtype=ir.DataType.FLOAT):
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["N"]))
    node = ir.node(op, [x], name="router/scores")
    return ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)


def test_a_coarse_node_is_named_with_its_range():
    assert accuracy.coarse(one("Sigmoid"), "cpu") == [
        "router/scores: Sigmoid is not accurate between -83 and -2.7",
    ]
    assert accuracy.coarse(one("Softplus"), "cpu") == []
    assert accuracy.coarse(one("Sigmoid"), "cuda") == []  # not measured


def test_an_engine_with_a_coarse_node_is_refused(monkeypatch):
    import torch

    from moeopt.backends.onnxrt import build as onnx_build
    from moeopt.backends.onnxrt.plan import OrtPlan
    from moeopt.errors import NotSaveableError
    from tests.lower.onnx.emitted import graph_of

    model = graph_of(torch.sigmoid, torch.randn(3), accurate=False)
    monkeypatch.setattr(onnx_build, "accurate_graph", lambda model: 0)
    with pytest.raises(NotSaveableError, match="Sigmoid is not accurate between .* on cpu, and has no other form here"):
        onnx_build.write_graph(model, [], {"inputs": [], "outputs": []}, OrtPlan("cpu"), lambda text: None, 0.0)
