"""Experts of one product each in a file: the chosen alone run where a choice is seen; where none is, all stay."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import moeopt
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.products import weight_products
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.single_chains import single_chains
from tests.backends.onnxrt.onnx_file.test_by_hand import optimized, reason, right
from tests.onnx_in.by_hand import E, File, H, I

O = 6


def matmul(file, x, e):
    return file.node("Relu", file.node("MatMul", x, file.weight(H, O, name=f"experts.{e}.w")))


def gemm(file, x, e):
    return file.node("Gemm", x, file.weight(O, H, name=f"experts.{e}.w"), file.weight(O), transB=1)


def einsum(file, x, e):
    return file.node("Einsum", x, file.weight(O, H, name=f"experts.{e}.w"), equation="th,oh->to")


def turned(file, x, e):
    """Half of the matrices lie turned in the file."""
    if e % 2:
        return file.node("MatMul", x, file.weight(H, O, name=f"experts.{e}.w"))
    return file.node("MatMul", x, file.node("Transpose", file.weight(O, H, name=f"experts.{e}.w"), perm=[1, 0]))


def by_table(file, expert=gemm):
    return file.dense(lambda x, e: expert(file, x, e))


def by_comparisons(file):
    """sum over k of (ids_k == e) * w_k"""
    weights, ids, _ = file.router()
    total = None
    for e in range(E):
        mine = file.node("Cast", file.node("Equal", ids, file.constant(np.int64(e))), to=1)
        part = file.node("Mul", gemm(file, "x", e), file.sum(file.node("Mul", mine, weights), -1, 1))
        total = part if total is None else file.node("Add", total, part)
    return total


def one_of_them(file):
    best = file.node("ArgMax", file.node("MatMul", "x", file.weight(H, E)), axis=-1, keepdims=1)
    total = file.constant(np.zeros((1, O), np.float32))
    for e in range(E):
        total = file.node("Where", file.node("Equal", best, file.constant(np.int64(e))), gemm(file, "x", e), total)
    return total


def gated_pair(file, x, e):
    up, gate = (file.node("MatMul", x, file.weight(H, I, name=f"experts.{e}.{n}")) for n in ("up", "gate"))
    hidden = file.node("Mul", file.node("Mul", gate, file.node("Sigmoid", gate)), up)
    return file.node("MatMul", hidden, file.weight(I, O, name=f"experts.{e}.down"))


def picked_rows(file, expert=gemm):
    weights, ids, _ = file.router()
    rows = file.node("Slice", file.node("Shape", "x"), file.constant([0]), file.constant([1]))
    total = file.node("Expand", file.constant(np.float32(0)), file.node("Concat", rows, file.constant([O]), axis=0))
    for e in range(E):
        where = file.node("NonZero", file.node("Equal", ids, file.constant(np.int64(e))))
        mine = file.node("Gather", where, file.constant(np.int64(0)), axis=0)
        share = file.node("GatherND", weights, file.node("Transpose", where, perm=[1, 0]))
        last = file.constant([-1])
        part = file.node("Mul", expert(file, file.node("Gather", "x", mine), e), file.node("Unsqueeze", share, last))
        total = file.node("ScatterND", total, file.node("Unsqueeze", mine, last), part, reduction="add")
    return total


def picked_results(file):
    weights, ids, _ = file.router()
    one = file.constant([1])
    every = file.node("Concat", *(file.node("Unsqueeze", gemm(file, "x", e), one) for e in range(E)), axis=1)
    last = file.constant([-1])
    width = file.node("Concat", file.node("Shape", ids), file.constant([O]), axis=0)
    where = file.node("Expand", file.node("Unsqueeze", ids, last), width)
    chosen = file.node("GatherElements", every, where, axis=1)
    return file.sum(file.node("Mul", chosen, file.node("Unsqueeze", weights, last)), 1, 0)


def beside_a_shared_one(file):
    return file.node("Add", by_table(file), file.node("MatMul", "x", file.weight(H, O, name="shared.w")))


def behind_a_shared_one(file):
    inner = file.node("MatMul", "x", file.weight(H, 3, name="down.w"))
    table = file.table(*file.router())
    return file.weighed(inner, table, lambda x, e: file.node("MatMul", x, file.weight(3, O, name=f"up.{e}.w")))


def own_softmax(file, x, e):
    return file.node("Softmax", gemm(file, x, e), axis=-1)


def gated(file, x, e):
    """Two products of the same rows, of which one gates the other."""
    gate, up = (file.node("MatMul", x, file.weight(H, O, name=f"experts.{e}.{n}")) for n in ("gate", "up"))
    return file.node("Mul", file.node("Sigmoid", gate), up)


def normed(file, x, e):
    rows = file.node("LayerNormalization", x, file.weight(H), file.weight(H), axis=-1)
    return file.node("MatMul", rows, file.weight(H, O, name=f"experts.{e}.w"))


def as_constants(file, x, e):
    held = numpy_helper.from_array(np.random.default_rng(e).normal(size=(H, O)).astype(np.float32))
    return file.node("MatMul", x, file.node("Constant", value=held))


def of_one_constant(file):
    every = file.weight(H, O * E, name="experts.w")
    places = [[file.constant([n]) for n in (O * e, O * e + O, 1)] for e in range(E)]
    return by_table(file, lambda file, x, e: file.node("MatMul", x, file.node("Slice", every, *places[e])))


def of_a_cut_stack(file):
    """The way that an exporter takes a Parameter apart."""
    parts = file.node("Split", file.weight(E, H, O, name="experts.w"), file.constant([1] * E), results=E, axis=0)
    first = file.constant([0])
    return by_table(file, lambda file, x, e: file.node("MatMul", x, file.node("Squeeze", parts[e], first)))


def by_one_hot(file):
    weights, ids, _ = file.router()
    flags = file.node("OneHot", ids, file.constant(np.int64(E)), file.constant(np.float32([0, 1])), axis=-1)
    table = file.sum(file.node("Mul", flags, file.node("Unsqueeze", weights, file.constant([-1]))), 1, 0)
    return file.weighed("x", table, lambda x, e: gemm(file, x, e))


def above_the_last_chosen(file):
    """A softmax of the scores that are no less than the K-th."""
    scores = file.node("MatMul", "x", file.weight(H, E))
    values, _ = file.node("TopK", scores, file.constant([2]), results=2, axis=-1)
    least = file.node("Slice", values, file.constant([1]), file.constant([2]), file.constant([1]))
    kept = file.node("GreaterOrEqual", scores, least)
    gate = file.node("Softmax", file.node("Where", kept, scores, file.constant(np.float32(-np.inf))), axis=-1)
    return file.weighed("x", gate, lambda x, e: gemm(file, x, e))


FORMS = {
    "MatMul": lambda file: by_table(file, matmul),
    "Gemm": by_table,
    "Einsum": lambda file: by_table(file, einsum),
    "turned": lambda file: by_table(file, turned),
    "comparisons": by_comparisons,
    "one": one_of_them,
    "rows": picked_rows,
    "results": picked_results,
    "shared": beside_a_shared_one,
    "behind": behind_a_shared_one,
    "softmax": lambda file: by_table(file, own_softmax),
    "gated": lambda file: by_table(file, gated),
    "normed": lambda file: by_table(file, normed),
    "constants": lambda file: by_table(file, as_constants),
    "parts": of_one_constant,
    "stack": of_a_cut_stack,
    "one hot": by_one_hot,
    "threshold": above_the_last_chosen,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_chosen_alone_run(form):
    file = File(opset=18)
    model = file.model(FORMS[form](file))
    found = optimized(model)
    right(model, found)
    (block,) = found.report.blocks
    assert (block.experts, block.top_k) == (E, {"one": 1, "threshold": None}.get(form, 2))


def test_it_is_verified_and_the_file_as_a_module_agrees():
    file = File()
    model = file.model(by_table(file))
    found = moeopt.optimize(model, verify="fast")
    assert found.certificate.passed and [b.status for b in found.report.blocks] == ["rewritten"]
    module = moeopt.from_onnx(model)
    again = moeopt.optimize(module, (torch.randn(5, H),), backend="onnxruntime", verify="off")
    assert [(b.status, b.experts) for b in again.report.blocks] == [("rewritten", E)]


def test_a_bias_is_an_input_of_its_product_as_it_was(tmp_path):
    file = File()
    optimized(file.model(by_table(file))).save(tmp_path / "bundle")
    nodes = onnx.load(tmp_path / "bundle" / "model.onnx").graph.node
    assert [len(node.input) for node in nodes if node.op_type == "Gemm"] == [3] * E
    assert "Add" not in [node.op_type for node in nodes]


def test_two_blocks_that_one_router_weighs():
    file = File()
    table = file.table(*file.router())
    blocks = [
        file.weighed("x", table, lambda x, e, b=b: file.node("MatMul", x, file.weight(H, O, name=f"{b}.{e}.w")))
        for b in "ab"
    ]
    model = file.model(file.node("Add", *blocks))
    found = optimized(model)
    right(model, found, count=2)
    assert [b.name for b in found.report.blocks] == ["a", "b"]


def test_blocks_of_one_product_and_of_two_are_in_the_order_of_the_file():
    file = File()
    first = file.node("Add", "x", file.dense(lambda x, e: file.node("MatMul", x, file.weight(H, H, name=f"a.{e}.w"))))
    table = file.table(*file.router(x=first))
    model = file.model(file.weighed(first, table, lambda x, e: file.expert(x, f"b.experts.{e}")))
    found = optimized(model)
    right(model, found, count=2)
    assert [b.name for b in found.report.blocks] == ["a", "b"]


def test_rows_that_are_weighed_before_the_product_have_an_entry():
    file = File()
    table, total = file.table(*file.router()), None
    for e in range(E):
        rows = file.node("Mul", "x", file.node("Gather", table, file.constant([e]), axis=1))
        part = file.node("MatMul", rows, file.weight(H, O, name=f"experts.{e}.w"))
        total = part if total is None else file.node("Add", total, part)
    assert reason(file.model(total)).startswith("no experts were read in its 4 chains of products (the node 'MatMul_")


def test_a_gate_that_chooses_none_has_the_reason_and_no_other_way_out():
    file = File()
    gate = file.node("Softmax", file.node("MatMul", "x", file.weight(H, E)), axis=-1)
    said = reason(file.model(file.weighed("x", gate, lambda x, e: gemm(file, x, e))))
    assert said.startswith("its experts are one matrix each, and every row passes all of them, weighed by a gate")
    assert said.endswith("loop over the experts with the rows that chose them")


@pytest.mark.parametrize("chosen", ["rows", "weights"])
def test_projections_of_what_a_router_chose_are_no_experts(chosen):
    """Those of an attention over chosen tokens: all of them read the same rows."""
    file = File()
    scores = file.node("MatMul", "x", file.weight(H, 2))
    if chosen == "rows":
        best = file.node("ArgMax", scores, axis=0, keepdims=0)
        rows = file.node("Gather", "x", best)
    else:
        rows = file.node("Mul", "x", file.node("Gather", file.node("Sigmoid", scores), file.constant([0]), axis=1))
    q, k, v = (file.node("MatMul", rows, file.weight(H, H, name=f"attention.{n}.w")) for n in "qkv")
    seen = file.node("Softmax", file.node("MatMul", q, file.node("Transpose", k, perm=[1, 0])), axis=-1)
    assert optimized(file.model(file.node("MatMul", seen, v))).report.blocks == ()


@pytest.mark.parametrize("half", ["up", "gate"])
def test_the_other_half_of_gated_experts_is_no_mixture_of_its_own(half):
    """Of what a chain of two products holds one half, and the other reads the same chosen rows."""
    file = File()
    index = GraphIndex(read_onnx(file.model(picked_rows(file, gated_pair))).model.graph)
    found = weight_products(index).items()
    within = {at for at, p in found if p.weight.name.endswith((half, "down"))}
    assert len(within) == 2 * E and list(single_chains(index, within)) == []


def test_projections_that_nothing_chooses_among_have_no_entry():
    file = File()
    q, k, v = (file.node("MatMul", "x", file.weight(H, H, name=f"attention.{n}.w")) for n in "qkv")
    seen = file.node("Softmax", file.node("MatMul", q, file.node("Transpose", k, perm=[1, 0])), axis=-1)
    gates = [file.node("Sigmoid", file.node("MatMul", "x", file.weight(H, H, name=f"cell.{n}.w"))) for n in "zr"]
    mixed = file.node("Mul", file.node("Add", *gates), file.node("MatMul", seen, v))
    assert optimized(file.model(mixed)).report.blocks == ()
