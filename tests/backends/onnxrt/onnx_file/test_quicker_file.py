"""Regions whose new form would be no faster than the file's own nodes are left as they are; no test times them."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from moeopt.backends.onnxrt.onnx_file import quicker_file
from moeopt.backends.onnxrt.onnx_file.region_file import described, only_region
from moeopt.errors import UsageError
from moeopt.onnx_in.cuts import GraphRegion
from moeopt.onnx_in.read import OnnxFile
from tests.backends.onnxrt.onnx_file.test_by_hand import optimized, right, run
from tests.backends.onnxrt.onnx_file.test_single_products import O, by_table, matmul, picked_rows
from tests.onnx_in.by_hand import File, H


@pytest.fixture
def asked(monkeypatch):
    """What is asked of this machine; each question is answered with ``answer`` of the first entry, and one about a
    single number of rows with what its ``at`` says of that number."""
    questions = []

    def fastest(question, ways, default, advantage):
        made = ways()
        for own, new in zip(made["file"], made["new"], strict=True):
            torch.testing.assert_close(new(), own(), rtol=1e-4, atol=1e-5)
        questions.append((question, [call.args[0] for call in made["file"]], default, advantage))
        return fastest.at.get(question.rpartition(": ")[2], fastest.answer)

    monkeypatch.setattr(quicker_file, "fastest", fastest)
    monkeypatch.setattr(quicker_file, "measuring", lambda: True)
    fastest.answer, fastest.at = "file", {}
    questions.append(fastest)
    return questions


def dense(**given):
    file = File(**given)
    return file.model(by_table(file))


def test_the_file_stays_where_it_is_as_fast(asked):
    model = dense()
    (block,) = optimized(model).report.blocks
    assert block.reason == (
        "left as it is: its experts are a function of a row, which would run expert by expert on sorted rows, and at "
        "1, 4, 16 and 128 rows a call, timed on this machine, ONNX Runtime runs the file's own nodes as fast or "
        "faster; if your calls have other numbers of rows, name them with tokens="
    )
    assert (block.kind, block.status, block.experts, block.lowering) == ("moe", "declined", 4, "")
    _, (_, runs, default, advantage) = asked
    assert [len(run["x"]) for run in runs] == [1, 4, 16, 128]
    assert default == "new" and advantage > 1, "at a tie the form that multiplies fewer rows is taken"


def test_at_a_tie_the_file_stays_that_multiplies_as_few_rows(asked):
    file = File()
    asked[0].answer = "new"
    optimized(file.model(picked_rows(file)))
    assert [default for _, _, default, _ in asked[1:]] == ["file", *["new"] * 4], "the mean, and each number of rows"


def test_the_new_form_is_taken_where_it_is_faster(asked):
    asked[0].answer = "new"
    model = dense()
    right(model, optimized(model))
    _, (_, runs, default, _), *single = asked
    assert len(runs) == 4 and default == "new"
    assert [(len(run["x"]), default) for _, (run,), default, _ in single] == [(n, "new") for n in (1, 4, 16, 128)]


def test_what_is_slower_at_one_number_of_rows_stays(asked):
    """However fast it is at the others."""
    asked[0].answer, asked[0].at = "new", {"1": "file", "16": "file"}
    (block,) = optimized(dense()).report.blocks
    assert block.reason == (
        "left as it is: its experts are a function of a row, which would run expert by expert on sorted rows, and of "
        "1, 4, 16 and 128 rows a call, timed on this machine, ONNX Runtime runs the file's own nodes faster at 1 and "
        "16; if your calls have other numbers of rows, name them with tokens="
    )
    right(dense(), optimized(dense(), tokens=(4, 128)))


def test_so_does_a_pair_of_matrices(asked):
    """It has kernels, and no question is asked about the mean."""
    asked[0].answer, asked[0].at = "new", {"128": "file"}
    file = File()
    (block,) = optimized(file.model(file.dense())).report.blocks
    assert block.reason == (
        "left as it is: of 1, 4, 16 and 128 rows a call, timed on this machine, ONNX Runtime runs the file's own nodes "
        "faster at 128; if your calls have other numbers of rows, name them with tokens="
    )
    assert [default for _, _, default, _ in asked[1:]] == ["new"] * 4


def test_tokens_name_the_rows(asked):
    (block,) = optimized(dense(), tokens=(3, 9)).report.blocks
    assert [len(run["x"]) for run in asked[1][1]] == [3, 9] and "at 3 and 9 rows a call" in block.reason


def test_one_block_of_two_stays(asked):
    """Their questions are two, as their functions are; the file is right, and no check of the block stays."""
    asked[0].at = dict.fromkeys(("1", "4", "16", "128"), "new")
    file = File()
    first = file.node("Add", "x", file.dense(lambda x, e: file.node("MatMul", x, file.weight(H, H, name=f"a.{e}.w"))))
    table = file.table(*file.router(x=first))
    model = file.model(file.weighed(first, table, lambda x, e: file.expert(x, f"b.experts.{e}")))
    found = optimized(model, verify="fast")
    assert [(b.name, b.status) for b in found.report.blocks] == [("a", "declined"), ("b", "rewritten")]
    assert found.certificate.passed and [c.name for c in found.certificate.blocks] == ["b"]
    assert len(asked) == 6, "on the mean for the first alone, as a pair of matrices has a kernel"


def test_what_flows_in_may_have_no_type_in_the_file(asked):
    """Rows that other nodes make of the input."""
    file = File()
    rows = file.node("Mul", "x", file.weight(H))
    table = file.table(*file.router(x=rows))
    model = file.model(file.weighed(rows, table, lambda x, e: matmul(file, x, e)))
    assert [b.status for b in optimized(model).report.blocks] == ["declined"]
    assert [len(value) for run in asked[1][1] for value in run.values()] == [1, 4, 16, 128]


def test_alike_blocks_are_one_question_and_other_nodes_another(asked):
    def blocks(*experts):
        file = File()
        table = file.table(*file.router())
        made = [
            file.weighed("x", table, lambda x, e, b=b, one=one: one(file, x, f"{b}.{e}"))
            for b, one in zip("ab", experts, strict=True)
        ]
        return file.model(file.node("Add", *made))

    def plain(file, x, name):
        return file.node("MatMul", x, file.weight(H, O, name=f"{name}.w"))

    def turned(file, x, name):
        return file.node("MatMul", x, file.node("Transpose", file.weight(O, H, name=f"{name}.w"), perm=[1, 0]))

    optimized(blocks(plain, plain))
    optimized(blocks(plain, turned))
    a, b, c, d = (question for question, *_ in asked[1:])
    assert a == b == c != d


def test_what_is_compared_with_is_what_the_file_has():
    """A branch stays one, with what its bodies read; what only a body makes has no place in the file's graph."""
    file = File()
    gate = file.node("ReduceMax", file.node("MatMul", "x", file.weight(H, 1)), keepdims=0)
    some, weight, other = file.node("Greater", gate, file.constant(np.float32(0))), file.weight(H, O), file.weight(O)
    bodies = [
        helper.make_graph([node], name, [], [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)])
        for name, node in (
            ("some", helper.make_node("Gemm", ["x", weight, other], ["ran"])),
            ("none", helper.make_node("MatMul", ["x", weight], ["spared"])),
        )
    ]
    chosen = file.node("If", some, then_branch=bodies[0], else_branch=bodies[1])
    given = OnnxFile("f", file.model(file.node("Relu", chosen)))
    values = {v.name: v for node in given.model.graph.all_nodes() for v in (*node.inputs, *node.outputs) if v}
    x, high = torch.randn(3, H), torch.ones(())
    flows = {"x": x, gate: high}
    made = only_region(given, GraphRegion((), (values["x"], values[gate]), values[chosen]), flows)
    assert [n.op_type for n in made.graph.node] == ["Greater", "If"]
    assert {t.name for t in made.graph.initializer} > {weight, other}
    held = {t.name: torch.from_numpy(numpy_helper.to_array(t)) for t in file.weights}
    torch.testing.assert_close(run(made, **flows)[0], x @ held[weight] + held[other])
    assert only_region(given, GraphRegion((), (values["x"],), values["ran"]), flows) is None
    assert described(made) != described(given.proto) and described(made) == described(made)


def test_where_nothing_is_timed_rows_and_nodes_are_counted(monkeypatch):
    """As many rows as in the file, and fewer nodes; or more of them, were those around the experts so many."""
    file = File()
    model = file.model(picked_rows(file))
    right(model, optimized(model))
    monkeypatch.setattr(quicker_file, "AROUND", 200)
    (block,) = optimized(model).report.blocks
    assert block.reason == (
        "left as it is: its experts are a function of a row, which would run expert by expert on sorted rows, and "
        "that would multiply as many rows as the file's own nodes do; with MOEOPT_MEASURE=on both are timed where "
        "the weights are at most 64 MB, and the faster is taken"
    )
    right(dense(), optimized(dense()))


def test_what_cannot_be_timed_is_counted_too(monkeypatch):
    def stops(*args, **more):
        raise UsageError("the engine stopped on these inputs: a shape")

    monkeypatch.setattr(quicker_file, "measuring", lambda: True)
    monkeypatch.setattr(quicker_file, "fastest", lambda question, ways, *more: ways())  # no stored answer
    monkeypatch.setattr(quicker_file, "_session", stops)
    right(dense(), optimized(dense()))
    monkeypatch.setattr(quicker_file, "AROUND", 200)
    file = File()
    (block,) = optimized(file.model(picked_rows(file))).report.blocks
    assert block.reason.endswith("could not be timed beside each other (the engine stopped on these inputs: a shape)")


def test_many_weights_are_not_timed(asked, monkeypatch):
    monkeypatch.setattr(quicker_file, "MOST", 0)
    for form, status in ((lambda file: by_table(file, matmul), "rewritten"), (picked_rows, "declined")):
        file = File()
        (block,) = optimized(file.model(form(file))).report.blocks
        assert (block.status, len(asked)) == (status, 1)
