"""Every operator that an exporter or a lowering can write is measured, has another form, or has a reason not to be."""

import importlib.util
import re
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.backends.onnxrt import accuracy_known as known

WRITTEN = re.compile(r"\b(?:op|opset\d+)\.([A-Z]\w+)\(|\b(?:op|ir\.node|node|make)\(\s*\"([A-Z]\w+)\"")
SOURCES = {
    "the exporter's translations": ("onnxscript", "function_libs/torch_lib"),
    "the exporter": ("torch", "onnx/_internal/exporter"),
    "moeopt": ("moeopt", "."),
}


def written(package, folder):
    """Operators that the sources of ``package`` write, by name."""
    root = Path(importlib.util.find_spec(package).origin).parent / folder
    text = "\n".join(path.read_text() for path in sorted(root.rglob("*.py")) if not path.name.endswith("_test.py"))
    return {name for match in WRITTEN.findall(text) for name in match if name}


@pytest.mark.parametrize("source", SOURCES)
def test_every_operator_that_is_written_is_known(source):
    found = written(*SOURCES[source])
    assert len(found) > 10, "the pattern finds what is written"
    assert found - known.KNOWN - known.ALONE == set()


def test_no_operator_has_two_reasons():
    lists = (known.EXACT, known.CONTROL, known.SUMS, known.LAYERS, known.OWN, known.RANDOM, known.RECURRENT)
    groups = [known._MEASURED, *lists, known.ALONE]
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(set(names))


class Sampled(nn.Module):
    """A grid sampler after a mixture of two experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)])

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            y[rows] += expert(x[rows]) * weights[rows, slots, None]
        return F.grid_sample(y.view(-1, 1, 2, 2), y[:, :2].view(-1, 1, 1, 2), align_corners=False)


def test_an_engine_with_an_operator_that_was_not_measured_says_so():
    opt = moeopt.optimize(Sampled().eval(), torch.randn(6, 4), backend="onnxruntime", progress=False)
    sentence = (
        "the kernels of GridSample were not measured over all magnitudes: what they give was compared with PyTorch on "
        "the inputs of the verification alone"
    )
    assert opt.report.notes.count(sentence) == 1


def graph(*nodes):
    return ir.Model(
        ir.Graph(nodes[0].inputs[:1], nodes[-1].outputs, nodes=nodes, opset_imports={"": 20}), ir_version=10
    )


def test_recurrent_layers_say_what_becomes_of_a_nan():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 2, 4]))
    assert known.kernel_notes(graph(ir.node("GRU", [x, x, x]), ir.node("LSTM", [x, x, x]))) == [
        "ONNX Runtime's GRU, LSTM takes NaN for a number: a sequence with a NaN gives finite results from there on, "
        "where PyTorch gives NaN"
    ]


def test_places_of_maxima_say_what_becomes_of_a_nan():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2, 4, 4]))
    pool = ir.node("MaxPool", [x], {"kernel_shape": [2, 2]}, num_outputs=2)
    whole = ir.Graph([x], [pool.outputs[0]], nodes=[pool], opset_imports={"": 20})
    assert known.kernel_notes(ir.Model(whole, ir_version=10)) == []
    whole.outputs.append(pool.outputs[1])
    assert known.kernel_notes(ir.Model(whole, ir_version=10)) == [
        "the places of maxima over windows (return_indices) are found as if a NaN were not there, where PyTorch takes "
        "the NaN"
    ]


def test_another_domain_is_not_looked_at():
    for domain, names in (("their.own", []), ("", ["the kernels of Strange"])):
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N"]))
        notes = known.kernel_notes(graph(ir.node("Strange", [x], domain=domain)))
        assert [note.split(" were")[0] for note in notes] == names
