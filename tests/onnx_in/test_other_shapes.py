"""Experts of one block whose weights lie in the file in several shapes, as optimisers of graphs leave them."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import moeopt
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.matrix_shapes import matrix_shape, shape_made
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.regions import candidate_regions
from tests.onnx_in.bodies import model
from tests.onnx_in.toys import run

E = 4
_HEAD = """
    scores = MatMul(x, gate)
    probs = Softmax <axis = -1> (scores)
    weights, ids = TopK <axis = -1> (probs, two)
    zeros = Mul(probs, none)
    table = ScatterElements <axis = -1> (zeros, ids, weights)
"""


def block():
    """Four experts, each a loop's round of its own, with matrices that are initializers up0, down0, up1, ..."""
    text, last = _HEAD, ""
    for e in range(E):
        text += f"""
    a{e} = MatMul(x, up{e})
    b{e} = Relu(a{e})
    c{e} = MatMul(b{e}, down{e})
    w{e} = Gather <axis = 1> (table, n{e})
    p{e} = Mul(c{e}, w{e})
"""
        text += f"    s{e} = Add({last}, p{e})\n" if last else ""
        last = f"s{e}" if last else f"p{e}"
    draw = np.random.default_rng(0)
    held = {f"n{e}": np.array([e]) for e in range(E)}
    held |= {f"up{e}": draw.normal(size=(8, 12)) for e in range(E)} | {
        f"down{e}": draw.normal(size=(12, 8)) for e in range(E)
    }
    return model(f"{text}    y = Identity({last})\n", **held)


VIEWS = {
    "turned": (lambda a: [a.T.copy()], [("Transpose", [])]),
    "flat": (lambda a: [a.reshape(-1)], [("Reshape", [[8, 12]])]),
    "two pieces": (lambda a: [a[:3], a[3:]], [("Concat", [], {"axis": 0})]),
    "a part": (lambda a: [np.concatenate([a, a])], [("Slice", [[0], [8], [0]])]),
    "one of a stack": (lambda a: [np.stack([a + 1, a])], [("Gather", [1], {"axis": 0})]),
    "a half": (lambda a: [a.astype("float16")], [("Cast", [], {"to": 1})]),
    "deeper": (lambda a: [a[None]], [("Squeeze", [[0]])]),
}


def in_view(view):
    """The block with the first matrix of expert 2 made of another constant by a node."""
    made = block()
    (held,) = [t for t in made.graph.initializer if t.name == "up2"]
    weight = numpy_helper.to_array(held)
    if view == "a half":
        weight = weight.astype("float16").astype("float32")
    made.graph.initializer.remove(held)
    pieces, ((op, rest, *more),) = VIEWS[view]
    names = [f"piece{n}" for n in range(len(pieces(weight)))]
    made.graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip(pieces(weight), names, strict=True))
    for number, values in enumerate(rest):
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(values), f"at{number}"))
    reads = [*names, *(f"at{n}" for n in range(len(rest)))]
    made.graph.node.insert(0, helper.make_node(op, reads, ["up2"], "view", **(more[0] if more else {})))
    return made


@pytest.mark.parametrize("view", VIEWS)
def test_the_shape_of_a_matrix_is_that_of_its_product(view):
    graph = read_onnx(in_view(view)).model.graph
    (product,) = [node for node in graph if node.outputs[0].name == "a2"]
    assert shape_made(product.inputs[1]) == matrix_shape(product, 1) == (8, 12)
    (candidate,) = candidate_regions(GraphIndex(graph))
    assert candidate.chains.experts == E and candidate.chains.in_several_shapes
    assert [p[0].node.outputs[0].name for p in candidate.chains.pairs] == [f"a{e}" for e in range(E)]


def test_a_product_that_turns_its_weight_says_so():
    made = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], "gemm", transB=1)], "g",
        [helper.make_tensor_value_info("x", 1, ["t", 8])], [helper.make_tensor_value_info("y", 1, ["t", 12])],
        [numpy_helper.from_array(np.zeros((12, 8), "float32"), "w")],
    )  # fmt: skip
    (product,) = read_onnx(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    ).model.graph
    assert matrix_shape(product, 1) == (8, 12)
    assert matrix_shape(product, 0) == ()


@pytest.mark.parametrize("view", ["turned", *(pytest.param(v, marks=pytest.mark.nightly) for v in ("flat", "a half"))])
def test_the_block_is_rewritten_and_no_expert_is_missed(view, tmp_path):
    made = in_view(view)
    onnx.save(made, tmp_path / "m.onnx")
    found = moeopt.optimize(tmp_path / "m.onnx", verify="off")
    assert [(b.status, b.experts, b.reason) for b in found.report.blocks] == [("rewritten", E, "")]
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found(x), run(tmp_path / "m.onnx", x=x)[0], rtol=1e-5, atol=1e-5)
