"""Experts of one block whose weights lie in the file in several shapes, as optimisers of graphs leave them."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import moeopt
from moeopt.onnx_in.frozen_routing import frozen_routing
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


def block(experts=E, head=_HEAD, own=""):
    """Four experts, each a loop's round of its own, with matrices that are initializers up0, down0, up1, ...

    ``own``: an operator that each of them applies to its rows first.
    """
    text, last = head, ""
    for e in range(experts):
        text += f"    x{e} = {own}(x)\n" if own else ""
        text += f"""
    a{e} = MatMul({f"x{e}" if own else "x"}, up{e})
    b{e} = Relu(a{e})
    c{e} = MatMul(b{e}, down{e})
"""
        text += f"    w{e} = Gather <axis = 1> (table, n{e})\n    p{e} = Mul(c{e}, w{e})\n" if head else ""
        text += "" if head else f"    p{e} = Identity(c{e})\n"
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


def weights_of(made, names):
    """The initializers of those names, which ``made`` loses."""
    held = {t.name: t for t in made.graph.initializer if t.name in names}
    for tensor in held.values():
        made.graph.initializer.remove(tensor)
    return [numpy_helper.to_array(held[name]) for name in names]


def turned(made, *names):
    """``made`` with those weights turned in the file, and turned back by a node each."""
    for name, weight in zip(names, weights_of(made, names), strict=True):
        made.graph.initializer.append(numpy_helper.from_array(weight.T.copy(), f"{name}_t"))
        made.graph.node.insert(0, helper.make_node("Transpose", [f"{name}_t"], [name], f"turn_{name}"))
    return made


def split(made, *names, axis=0):
    """``made`` with those weights in one constant, which a node splits."""
    weights = weights_of(made, names)
    sizes = np.array([w.shape[axis] for w in weights])
    held = {f"all_{names[0]}": np.concatenate(weights, axis), f"sizes_{names[0]}": sizes}
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in held.items())
    made.graph.node.insert(0, helper.make_node("Split", [*held], names, f"split_{names[0]}", axis=axis))
    return made


def taken(made, *names, places=None):
    """``made`` with those weights in a stack, out of which a node each takes one."""
    weights = weights_of(made, names)
    stack = np.zeros((max(places or range(len(names))) + 1, *weights[0].shape), weights[0].dtype)
    for name, weight, place in zip(names, weights, places or range(len(names)), strict=True):
        stack[place] = weight
        made.graph.initializer.append(numpy_helper.from_array(np.array(place), f"at_{name}"))
        made.graph.node.insert(0, helper.make_node("Gather", [f"stack_{names[0]}", f"at_{name}"], [name], f"t_{name}"))
    made.graph.initializer.append(numpy_helper.from_array(stack, f"stack_{names[0]}"))
    return made


UPS, DOWNS = ([f"{side}{e}" for e in range(E)] for side in ("up", "down"))
SEVERAL = {
    "two of two shapes each": lambda: turned(split(block(), "up0", "up3"), "up1", "up2"),
    "two split": lambda: split(split(block(), "up1", "up2"), "down1", "down2", axis=1),
    "all split": lambda: split(split(block(), *UPS), *DOWNS),
    "two and two split": lambda: split(split(split(split(block(), *UPS[:2]), *UPS[2:]), *DOWNS[:2]), *DOWNS[2:]),
    "two of a stack": lambda: taken(taken(block(), *UPS[1:3]), *DOWNS[1:3]),
    "four of a stack of six": lambda: taken(block(), *UPS, places=[0, 2, 3, 5]),
    "behind norms of their own": lambda: turned(block(own="Abs"), "up1", "up2"),
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


def experts_of(made):
    return [c.chains.experts for c in candidate_regions(GraphIndex(read_onnx(made).model.graph))]


@pytest.mark.parametrize("how", SEVERAL)
def test_several_experts_in_another_shape_are_experts_of_the_block(how):
    (candidate,) = found = list(candidate_regions(GraphIndex(read_onnx(SEVERAL[how]()).model.graph)))
    assert candidate.chains.experts == E
    assert not frozen_routing(candidate, found)
    assert candidate.chains.in_several_shapes == (how != "all split")


REWRITTEN = [pytest.param(how, marks=[] if how == "two and two split" else pytest.mark.nightly) for how in SEVERAL]


@pytest.mark.parametrize("how", REWRITTEN)
def test_such_a_block_is_rewritten(how, tmp_path):
    onnx.save(SEVERAL[how](), tmp_path / "m.onnx")
    found = moeopt.optimize(tmp_path / "m.onnx", verify="off")
    assert [(b.status, b.experts, b.reason) for b in found.report.blocks] == [("rewritten", E, "")]
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found(x), run(tmp_path / "m.onnx", x=x)[0], rtol=1e-5, atol=1e-5)


def test_experts_that_are_missing_from_a_stack_are_told():
    made = taken(block(experts=E - 1), *UPS[: E - 1], places=[0, 1, 3])
    (candidate,) = found = list(candidate_regions(GraphIndex(read_onnx(made).model.graph)))
    assert candidate.chains.experts == E - 1
    assert f"its router scores {E} experts, and the file holds {E - 1}" in frozen_routing(candidate, found)


def test_pieces_of_one_network_are_no_experts():
    assert experts_of(split(split(block(head=""), *UPS, axis=1), *DOWNS)) == []
    assert experts_of(block(head="")) == [E]


def test_a_part_that_is_cut_twice_is_one_matrix():
    made = block(experts=2)
    for tensor in [t for t in made.graph.initializer if t.name == "up1"]:
        made.graph.initializer.remove(tensor)
    made = taken(made, "up0", places=[1])
    (node,) = [n for n in made.graph.node if n.output[0] == "up0"]
    made.graph.node.insert(0, helper.make_node("Gather", list(node.input), ["up1"], "again"))
    (candidate,) = candidate_regions(GraphIndex(read_onnx(made).model.graph))
    assert len({first.function for first, _ in candidate.chains.pairs}) == 1 and candidate.regions[0].shares
