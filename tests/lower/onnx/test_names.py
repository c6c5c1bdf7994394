"""Nodes are named by the module that they come of; those that passes made by what they stand for."""

import onnx_ir as ir
import pytest

from moeopt.lower.onnx.names import SCOPES, name_by_module


def made(op, inputs, *scopes, name=None, **attributes):
    """A node whose exporter kept ``scopes``; one without any is a pass's own."""
    node = ir.node(op, inputs, attributes, name=name)
    if scopes:
        node.metadata_props[SCOPES] = repr(["", *scopes, "fx_name"])
    return node


def named(nodes, blocks=()):
    """The names of ``nodes`` in a graph, once named; a second time changes none."""
    model = ir.Model(ir.Graph([], [], nodes=nodes, opset_imports={"": 20}), ir_version=10)
    name_by_module(model, blocks)
    names = [n.name for n in model.graph.all_nodes()]
    name_by_module(model, blocks)
    assert [n.name for n in model.graph.all_nodes()] == names and len(set(names)) == len(names)
    return names


def value(node):
    return node.outputs[0]


def test_the_path_and_the_operator():
    first = made("MatMul", [], "layers.0", "layers.0.q", name="node_linear")
    second = made("MatMul", [value(first)], "layers.0", "layers.0.q", name="node_linear_1")
    own = made("Add", [value(second)], name="node_add")
    own.metadata_props[SCOPES] = repr(["", "add"])
    assert named([first, second, own]) == ["layers.0.q/MatMul", "layers.0.q/MatMul_1", "Add"]


def test_a_made_node_has_the_path_that_its_readers_share():
    x = made("Relu", [], "norm")
    product = made("MatMul", [value(x)])
    split = made("Split", [value(product)])
    q = made("Reshape", [value(split)], "layers.0.attn")
    k = made("Relu", [value(split)], "layers.0.attn", "layers.0.attn.k_norm")
    assert named([x, product, split, q, k])[1:3] == ["layers.0.attn/MatMul", "layers.0.attn/Split"]


def test_a_made_node_that_none_reads_has_the_path_of_what_it_reads():
    x = made("MatMul", [], "head")
    assert named([x, made("Cast", [value(x)], to=1)]) == ["head/MatMul", "head/Cast"]


def test_a_size_that_no_module_takes_is_of_those_that_read_it():
    size = made("Shape", [], "_empty_nn_module_stack_from_metadata_hook", name="node_Shape_0")
    readers = [made("Range", [value(size)], "model", f"model.{part}") for part in ("rotary", "layers.0")]
    assert named([size, *readers])[0] == "model/Shape"


def test_names_that_were_given_stay_but_for_the_second_of_two():
    given = [made("Gather", [], name="the ids are outside"), *(made("Mul", [], name="node_mlp/up") for _ in range(2))]
    assert named(given, ["node_mlp"]) == ["the ids are outside", "node_mlp/up", "node_mlp/up_1"]


@pytest.mark.parametrize("block", ["layers.0", "a"])
def test_only_a_blocks_own_nodes_begin_with_its_name(block):
    experts = made("MoE", [], name=f"{block}/MatMul")
    around = made("MatMul", [value(experts)], block, name="node_linear")
    below = made("MatMul", [value(around)], block, "a/b", name="node_linear_1")
    assert named([experts, around, below], [block]) == [f"{block}/MatMul", f"{block}.forward/MatMul", "a_b/MatMul"]


def test_nodes_of_a_body_have_names_too():
    inner = made("Relu", [], "layers.0")
    body = ir.Graph([], [value(inner)], nodes=[inner], name="body")
    branch = made("If", [], "layers.0", then_branch=body, else_branch=ir.Graph([], [], nodes=[], name="none"))
    assert sorted(named([branch])) == ["layers.0/If", "layers.0/Relu"]
