"""Regions are found by what reads what; the search looks at each node a fixed number of times, of how many ever."""

import re

import pytest
import torch

from moeopt.backends.onnxrt.onnx_file import original
from moeopt.backends.onnxrt.onnx_file.original import _multiply
from moeopt.backends.onnxrt.onnx_file.stitch import _drop
from moeopt.onnx_in.frozen_routing import frozen_routing
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.program import SizeTerm
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.region_module import _term
from moeopt.onnx_in.regions import candidate_regions
from tests.onnx_in.long_graph import model


def searched(layers, experts=4):
    index = GraphIndex(read_onnx(model(layers, experts)).model.graph)
    return index, list(candidate_regions(index))


def test_each_layer_is_a_region_from_its_rows_to_the_sum_of_its_experts():
    _, found = searched(3)
    assert [(c.name, c.chains.experts) for c in found] == [(f"layers.{n}", 4) for n in range(3)]
    first = [c.regions[0] for c in found]
    assert [[v.name for v in r.entries] for r in first] == [[f"layers.{n}.norm"] for n in range(3)]
    assert [r.exit.name for r in first] == [f"layers.{n}.sum3" for n in range(3)]
    assert {node.op_type for node in first[0].nodes} == {"MatMul", "Softmax", "Relu", "Gather", "Mul", "Add"}


@pytest.mark.parametrize("experts", [4, 32])
def test_the_search_grows_as_the_graph_does(experts):
    looked = []
    for layers in (8, 32, 128 if experts == 4 else 64):
        index, found = searched(layers, experts)
        assert len(found) == layers
        looked.append(index.visited / len(index.nodes))
    assert max(looked) < 80 and looked[-1] < 1.3 * looked[1]


def test_frozen_routing_is_told_without_another_look_at_the_whole_graph():
    index, found = searched(16)
    before = index.visited
    assert {frozen_routing(candidate) for candidate in found} == {""}
    assert index.visited == before


def test_a_factor_stands_behind_each_value_and_what_reads_it_reads_the_product():
    graph = model(3).graph
    before = [n.name for n in graph.node]
    _multiply(graph, {"layers.0.sum3": "f0", "layers.2.sum3": "f2"})
    made = {n.output[0]: n for n in graph.node}
    for layer, factor in ((0, "f0"), (2, "f2")):
        product = made[f"layers.{layer}.sum3"]
        assert product.op_type == "Mul" and list(product.input) == [f"layers.{layer}.sum3.moeopt.still", factor]
        assert made[product.input[0]].name == f"layers.{layer}.sum3"
    assert [n.name for n in graph.node if not n.name.startswith("moeopt.")] == before


def test_entries_go_by_name_wherever_they_stand():
    graph = model(2).graph
    names = [t.name for t in graph.initializer]
    for gone in ({names[0]}, {names[1], names[2], names[-1]}, set(), set(names)):
        graph = model(2).graph
        _drop(graph.initializer, gone)
        assert [t.name for t in graph.initializer] == [n for n in names if n not in gone]


def test_a_name_that_a_module_has_already_is_not_taken_twice():
    graph = model(1)
    for tensor in graph.graph.initializer:
        tensor.name = tensor.name.replace("layers.0", "training.program.forward")
    for node in graph.graph.node:
        for number, name in enumerate(node.input):
            node.input[number] = name.replace("layers.0", "training.program.forward") if "experts" in name else name
        for number, name in enumerate(node.input):
            node.input[number] = name.replace("layers.0.gate", "training.program.forward.gate")
            node.input[number] = node.input[number].replace("layers.0.column", "training.program.forward.column")
    (found,) = candidate_regions(GraphIndex(read_onnx(graph).model.graph))
    assert found.name == "training_.program_.forward_"


def test_a_region_whose_name_lies_within_another_s_is_numbered_where_they_part():
    """``mlp`` of one region and ``mlp.experts_of_two`` of the next cannot both be modules of these names."""
    graph = model(3)
    new = {"layers.0": "mlp", "layers.1": "mlp.second", "layers.2": "mlp.second.third"}

    def renamed(name):
        return next((name.replace(old, to, 1) for old, to in new.items() if name.startswith(f"{old}.")), name)

    for tensor in graph.graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in graph.graph.node:
        node.input[:], node.output[:] = map(renamed, node.input), map(renamed, node.output)
    graph.graph.output[0].name = renamed(graph.graph.output[0].name)
    found = candidate_regions(GraphIndex(read_onnx(graph).model.graph))
    assert [region.name for region in found] == ["mlp", "mlp_2.second", "mlp_2.second_2.third"]


def test_a_message_of_onnx_runtime_s_is_cut_before_it_is_searched(monkeypatch):
    """What precedes the message names a place in the runtime's own code; quoted names may be of any length."""
    read = []
    monkeypatch.setattr(original.re, "sub", lambda *args, real=re.sub: read.append(len(args[2])) or real(*args))
    told = original._said(RuntimeError("/a/b.cc:12 void f(int) const Cannot load 'x'"))
    assert told == "Cannot load 'x'"
    assert original._said(RuntimeError("a.cc:1 " * 50_000)) and max(read) <= 2000
    assert original._said(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("numbers", "size"),
    [
        ([10, 21], SizeTerm(1, ((0, 0), (0, 1)))),  # tokens
        ([30, 63], SizeTerm(3, ((0, 0), (0, 1)))),  # what each of them chooses
        ([4, 6], SizeTerm(2, ((0, 0),))),
        ([8, 8], SizeTerm(8)),
        ([30, 64], None),
        ([0, 0], SizeTerm(0)),
    ],
)
def test_a_size_is_a_constant_a_product_of_the_rows_sizes_or_a_multiple_of_one(numbers, size):
    runs = [{"x": torch.zeros(shape)} for shape in ((2, 5, 32), (3, 7, 32))]
    dims = [(0, d) for d in range(3)]
    assert _term(numbers, dims, ["x"], runs) == size
