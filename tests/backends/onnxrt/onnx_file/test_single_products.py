"""Experts of one product each in a file: the chosen alone run where a choice is seen; where none is, all stay."""

import numpy as np
import pytest
import torch

import moeopt
from tests.backends.onnxrt.onnx_file.test_by_hand import optimized, reason, right
from tests.onnx_in.by_hand import E, File, H

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


def picked_rows(file):
    weights, ids, _ = file.router()
    rows = file.node("Slice", file.node("Shape", "x"), file.constant([0]), file.constant([1]))
    total = file.node("Expand", file.constant(np.float32(0)), file.node("Concat", rows, file.constant([O]), axis=0))
    for e in range(E):
        where = file.node("NonZero", file.node("Equal", ids, file.constant(np.int64(e))))
        mine = file.node("Gather", where, file.constant(np.int64(0)), axis=0)
        share = file.node("GatherND", weights, file.node("Transpose", where, perm=[1, 0]))
        last = file.constant([-1])
        part = file.node("Mul", gemm(file, file.node("Gather", "x", mine), e), file.node("Unsqueeze", share, last))
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
}


@pytest.mark.parametrize("form", FORMS)
def test_the_chosen_alone_run(form):
    file = File(opset=18)
    model = file.model(FORMS[form](file))
    found = optimized(model)
    right(model, found)
    (block,) = found.report.blocks
    assert (block.experts, block.top_k) == (E, 1 if form == "one" else 2)


def test_it_is_verified_and_the_file_as_a_module_agrees():
    file = File()
    model = file.model(by_table(file))
    found = moeopt.optimize(model, verify="fast")
    assert found.certificate.passed and [b.status for b in found.report.blocks] == ["rewritten"]
    module = moeopt.from_onnx(model)
    again = moeopt.optimize(module, (torch.randn(5, H),), backend="onnxruntime", verify="off")
    assert [(b.status, b.experts) for b in again.report.blocks] == [("rewritten", E)]


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


def test_a_gate_that_chooses_none_has_the_reason_and_no_other_way_out():
    file = File()
    gate = file.node("Softmax", file.node("MatMul", "x", file.weight(H, E)), axis=-1)
    said = reason(file.model(file.weighed("x", gate, lambda x, e: gemm(file, x, e))))
    assert said.startswith("its experts are one matrix each, and every row passes all of them, weighed by a gate")
    assert said.endswith("loop over the experts with the rows that chose them")


@pytest.mark.parametrize("form", ["MatMul", "Einsum", "table inside"])
def test_one_product_of_a_stack_has_the_reason(form):
    file = File()
    table = file.table(*file.router())
    stack = file.weight(E, H, O, name="experts.w")
    if form == "MatMul":
        every = file.node("MatMul", file.node("Unsqueeze", "x", file.constant([0])), stack)
        columns = file.node("Unsqueeze", file.node("Transpose", table, perm=[1, 0]), file.constant([-1]))
        result = file.sum(file.node("Mul", every, columns), 0, 0)
    elif form == "Einsum":
        every = file.node("Relu", file.node("Einsum", "x", stack, equation="th,eho->teo"))
        result = file.node("Einsum", every, table, equation="teo,te->to")
    else:
        result = file.node("Einsum", "x", stack, table, equation="th,eho,te->to")
    said = reason(file.model(result))
    assert said.startswith("its experts are matrices of one stack (experts_w), and one product multiplies every row by")
    assert "to run the chosen alone, loop over the experts with the rows that chose them" in said


def test_projections_that_nothing_chooses_among_have_no_entry():
    file = File()
    q, k, v = (file.node("MatMul", "x", file.weight(H, H, name=f"attention.{n}.w")) for n in "qkv")
    seen = file.node("Softmax", file.node("MatMul", q, file.node("Transpose", k, perm=[1, 0])), axis=-1)
    gates = [file.node("Sigmoid", file.node("MatMul", "x", file.weight(H, H, name=f"cell.{n}.w"))) for n in "zr"]
    mixed = file.node("Mul", file.node("Add", *gates), file.node("MatMul", seen, v))
    assert optimized(file.model(mixed)).report.blocks == ()
