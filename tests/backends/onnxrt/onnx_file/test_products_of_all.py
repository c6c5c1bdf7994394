"""Experts of one matrix each, which one product multiplies by at once, or looks up: the chosen alone run."""

import numpy as np
import pytest
import torch

import moeopt
from moeopt.onnx_in.step_writer import StepWriter
from tests.backends.onnxrt.onnx_file.test_by_hand import optimized, reason, right, run
from tests.onnx_in.by_hand import E, File, H, I, K

O = 6


def stack(file, *shape, name="experts.w"):
    return file.weight(*(shape or (E, H, O)), name=name)


def by_columns(file, every, table, axis=0):
    """The sum over experts, which lie along ``axis``, of their results times their columns of the table."""
    table = table if axis else file.node("Transpose", table, perm=[1, 0])
    return file.sum(file.node("Mul", every, file.node("Unsqueeze", table, file.constant([-1]))), axis, 0)


def picked(file, every, weights, ids):
    """The chosen of all results (T, E, O), weighed and added up."""
    width = file.node("Concat", file.node("Shape", ids), file.constant([O]), axis=0)
    where = file.node("Expand", file.node("Unsqueeze", ids, file.constant([-1])), width)
    return chosen(file, file.node("GatherElements", every, where, axis=1), weights)


def chosen(file, results, weights):
    return file.sum(file.node("Mul", results, file.node("Unsqueeze", weights, file.constant([-1]))), 1, 0)


def matmul(file):
    rows = file.node("Unsqueeze", "x", file.constant([0]))
    return by_columns(file, file.node("MatMul", rows, stack(file)), file.table(*file.router()))


def with_bias(file):
    """A stack of biases, and an activation that reads its rows twice."""
    every = file.node("Add", file.node("MatMul", "x", stack(file)), file.weight(E, 1, O))
    every = file.node("Mul", every, file.node("Sigmoid", every))
    return by_columns(file, every, file.table(*file.router()))


def turned(file):
    every = file.node("MatMul", "x", file.node("Transpose", stack(file, E, O, H), perm=[0, 2, 1]))
    return by_columns(file, every, file.table(*file.router()))


def repeated_rows(file):
    shape = file.node("Concat", file.constant([E]), file.node("Shape", "x"), axis=0)
    rows = file.node("Expand", file.node("Unsqueeze", "x", file.constant([0])), shape)
    return by_columns(file, file.node("MatMul", rows, stack(file)), file.table(*file.router()))


def einsum(file):
    every = file.node("Relu", file.node("Einsum", "x", stack(file), equation="th,eho->teo"))
    return file.node("Einsum", every, file.table(*file.router()), equation="teo,te->to")


def einsum_of_three(file):
    return file.node("Einsum", "x", stack(file), file.table(*file.router()), equation="th,eho,te->to")


def picked_results(file):
    weights, ids, _ = file.router()
    every = file.node("Add", file.node("MatMul", "x", stack(file)), file.weight(E, 1, O))
    return picked(file, file.node("Transpose", every, perm=[1, 0, 2]), weights, ids)


def side_by_side(file):
    every = file.node("Gemm", "x", stack(file, E * O, H), file.weight(E * O), transB=1, alpha=1.0)
    every = file.node("Relu", file.node("Reshape", every, file.constant([-1, E, O])))
    return by_columns(file, every, file.table(*file.router()), axis=1)


def side_by_side_and_a_row_of_weights(file):
    every = file.node("Reshape", file.node("MatMul", "x", stack(file, H, E * O)), file.constant([0, E, O]))
    row = file.node("Unsqueeze", file.table(*file.router()), file.constant([1]))
    return file.node("Squeeze", file.node("MatMul", row, every), file.constant([1]))


def first_layers_side_by_side(file):
    """Gate and up of all experts are a product each; the last layers are a stack."""
    gate, up = (
        file.node("Reshape", file.node("MatMul", "x", stack(file, H, E * I, name=name)), file.constant([0, E, I]))
        for name in ("experts.gate", "experts.up")
    )
    hidden = file.node("Mul", file.node("Mul", gate, file.node("Sigmoid", gate)), up)
    every = file.node("Einsum", hidden, stack(file, E, I, O), equation="tei,eio->teo")
    return by_columns(file, every, file.table(*file.router()), axis=1)


def looked_up(file):
    weights, ids, _ = file.router()
    rows = file.node("Unsqueeze", "x", file.constant([1, 2]))
    every = file.node("MatMul", rows, file.node("Gather", stack(file), ids, axis=0))
    every = file.node("Squeeze", every, file.constant([2]))
    return chosen(
        file, file.node("Relu", file.node("Add", every, file.node("Gather", file.weight(E, O), ids))), weights
    )


def looked_up_turned(file):
    """The rows are written out for each choice, and the matrices lie turned."""
    weights, ids, _ = file.router()
    rows = file.node("Expand", file.node("Unsqueeze", "x", file.constant([1, 2])), file.constant([1, K, 1, 1]))
    matrices = file.node("Transpose", file.node("Gather", stack(file, E, O, H), ids, axis=0), perm=[0, 1, 3, 2])
    return chosen(file, file.node("Squeeze", file.node("MatMul", rows, matrices), file.constant([2])), weights)


def looked_up_columns(file):
    """As torch's newer exporter writes them: by GatherND, and with the matrix on the left."""
    weights, ids, _ = file.router()
    last = file.constant([-1])
    places = file.node("Unsqueeze", ids, last)
    columns = file.node("Unsqueeze", file.node("Unsqueeze", "x", file.constant([1])), file.constant([3]))
    every = file.node("MatMul", file.node("GatherND", stack(file, E, O, H), places, batch_dims=0), columns)
    every = file.node("Add", file.node("Squeeze", every, last), file.node("GatherND", file.weight(E, O), places))
    return chosen(file, every, weights)


def looked_up_by_einsum(file):
    weights, ids, _ = file.router()
    return chosen(
        file, file.node("Einsum", "x", file.node("Gather", stack(file), ids), equation="th,tkho->tko"), weights
    )


def looked_up_flat(file):
    """Rows of their own for each choice."""
    weights, ids, _ = file.router()
    rows = file.node("Expand", file.node("Unsqueeze", "x", file.constant([1])), file.constant([1, K, 1]))
    matrices = file.node("Gather", stack(file), file.node("Reshape", ids, file.constant([-1])), axis=0)
    every = file.node("MatMul", file.node("Reshape", rows, file.constant([-1, 1, H])), matrices)
    return chosen(file, file.node("Reshape", every, file.constant([-1, K, O])), weights)


def the_best_alone(file):
    best = file.node("ArgMax", file.node("MatMul", "x", file.weight(H, E)), axis=-1, keepdims=0)
    rows = file.node("Unsqueeze", "x", file.constant([1]))
    return file.node("Squeeze", file.node("MatMul", rows, file.node("Gather", stack(file), best)), file.constant([1]))


FORMS = (
    matmul, with_bias, turned, repeated_rows, einsum, einsum_of_three, picked_results, side_by_side,
    side_by_side_and_a_row_of_weights, first_layers_side_by_side, looked_up, looked_up_turned, looked_up_columns,
    looked_up_by_einsum, looked_up_flat, the_best_alone,
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_chosen_alone_run(form):
    file = File(opset=18)
    model = file.model(form(file))
    found = optimized(model)
    right(model, found)
    (block,) = found.report.blocks
    assert (block.name, block.experts, block.top_k) == ("experts", E, 1 if form is the_best_alone else K)


def test_it_is_verified_and_the_file_as_a_module_agrees():
    file = File(opset=18)
    model = file.model(looked_up(file))
    assert optimized(model, verify="fast").certificate.passed
    x = torch.randn(5, H)
    module = moeopt.from_onnx(model)
    torch.testing.assert_close(module(x), run(model, x=x)[0], rtol=1e-4, atol=1e-5)
    again = moeopt.optimize(module, (x,), backend="onnxruntime", verify="off")
    assert [(b.status, b.experts) for b in again.report.blocks] == [("rewritten", E)]


def test_a_hundred_experts_are_taken_apart_too():
    file, many = File(opset=18), 128
    weights, ids, _ = file.router(experts=many)
    matrices = file.node("Gather", file.weight(many, H, O, name="experts.w"), ids, axis=0)
    every = file.node("MatMul", file.node("Unsqueeze", "x", file.constant([1, 2])), matrices)
    model = file.model(chosen(file, file.node("Squeeze", every, file.constant([2])), weights))
    right(model, optimized(model))


@pytest.mark.parametrize("form", ["stack", "lookup"])
def test_layers_one_behind_the_other_are_two_blocks(form):
    """The product of the first and that of the second are no two layers of one expert."""
    file, x = File(opset=18), "x"
    for name in "ab":
        weights, ids, logits = file.router(x=x)
        matrices = file.weight(E, H, H, name=f"{name}.experts.w")
        if form == "stack":
            every = file.node("Tanh", file.node("MatMul", x, matrices))
            result = by_columns(file, every, file.table(weights, ids, logits))
        else:
            rows = file.node("Unsqueeze", x, file.constant([1, 2]))
            every = file.node("MatMul", rows, file.node("Gather", matrices, ids, axis=0))
            result = chosen(file, file.node("Tanh", file.node("Squeeze", every, file.constant([2]))), weights)
        x = file.node("Add", x, result)
    model = file.model(x)
    found = optimized(model)
    right(model, found, count=2)
    assert [(b.name, b.experts) for b in found.report.blocks] == [("a", E), ("b", E)]


def test_a_gate_that_chooses_none_has_the_reason():
    file = File(opset=18)
    gate = file.node("Softmax", file.node("MatMul", "x", file.weight(H, E)), axis=-1)
    said = reason(file.model(by_columns(file, file.node("MatMul", "x", stack(file)), gate)))
    assert said.startswith("its experts are one matrix each, and every row passes all of them, weighed by a gate")


def test_rows_that_are_weighed_before_the_product_have_the_reason():
    file = File(opset=18)
    columns = file.node(
        "Unsqueeze", file.node("Transpose", file.table(*file.router()), perm=[1, 0]), file.constant([-1])
    )
    rows = file.node("Mul", file.node("Unsqueeze", "x", file.constant([0])), columns)
    said = reason(file.model(file.sum(file.node("MatMul", rows, stack(file)), 0, 0)))
    assert said.startswith("its experts are matrices of one stack (experts_w), and one product multiplies every row by")
    assert "to run the chosen alone, loop over the experts with the rows that chose them" in said


def test_heads_of_an_attention_are_no_experts():
    """A stack of projections, as many as a router far from them scores."""
    file, D = File(opset=18), 4
    q, k, v = (file.node("MatMul", "x", file.weight(E, H, D, name=f"attention.{n}")) for n in "qkv")
    scores = file.node("Softmax", file.node("MatMul", q, file.node("Transpose", k, perm=[0, 2, 1])), axis=-1)
    heads = file.node("Transpose", file.node("MatMul", scores, v), perm=[1, 0, 2])
    out = file.node("MatMul", file.node("Reshape", heads, file.constant([-1, E * D])), file.weight(E * D, H))
    assert not optimized(file.model(out)).report.blocks


def test_a_product_behind_a_dense_layer_begins_at_the_layer_s_result():
    file = File(opset=18)
    before = file.node("Relu", file.node("MatMul", "x", file.weight(H, H, name="before")))
    table = file.table(*file.router(x=before))
    model = file.model(by_columns(file, file.node("MatMul", before, stack(file)), table))
    right(model, optimized(model))


def test_columns_that_do_not_lie_side_by_side_are_not_taken_for_experts():
    """Each expert has every E-th column."""
    file = File(opset=18)
    every = file.node("Reshape", file.node("MatMul", "x", stack(file, H, O * E)), file.constant([0, O, E]))
    table = file.node("Unsqueeze", file.table(*file.router()), file.constant([1]))
    model = file.model(file.sum(file.node("Mul", every, table), 2, 0))
    found, x = optimized(model), torch.from_numpy(np.random.default_rng(3).normal(size=(5, H)).astype(np.float32))
    torch.testing.assert_close(found(x=x), run(model, x=x)[0])


def test_constants_that_are_called_as_a_part_would_be_are_others():
    """``experts.w`` is a stack, and ``experts.w.0`` what the file multiplies rows with before."""
    file = File(opset=18)
    rows = file.node("MatMul", "x", file.weight(H, H, name="experts.w.0"))
    every = file.node("Relu", file.node("MatMul", rows, stack(file, E, H, H)))
    every = file.node("Mul", every, file.weight(H, name="experts.w.1"))
    model = file.model(by_columns(file, every, file.table(*file.router())))
    right(model, optimized(model))


def test_each_part_of_a_constant_is_one_of_its_own():
    """The same constant cut along either axis, into more parts, and read as a stack."""
    held = torch.arange(64.0).view(4, 4, 4)
    out = StepWriter((), {"w": held, "w.1": held[0], "w.1.of_0": held[0]}, {})
    wanted = {
        out.matrix("w", 1): held[1], out.matrix("w", 1, turned=True): held[1].T, out.place("w", 0, 1): held[1],
        out.place("w", 1, 1): held[:, 1], out.cut("w", 0, 2, 1): held[2:], out.cut("w", 1, 2, 1): held[:, 2:],
        out.cut("w", 1, 4, 1): held[:, 1:2],
    }  # fmt: skip
    assert len(wanted) == 7 and out.matrix("w", 1) in wanted
    for name, part in wanted.items():
        torch.testing.assert_close(out.constants[name], part)
