"""Blocks as exporters of vendors write them: each is rewritten and right at other sizes, or has a true reason."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import moeopt
from tests.onnx_in.by_hand import E, File, H, I, K


def run(model, **feeds):
    """What ONNX Runtime gives for the file as it is."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return [torch.from_numpy(y) for y in session.run(None, {name: value.numpy() for name, value in feeds.items()})]


def optimized(model, **fields):
    return moeopt.optimize(model, **{"verify": "off", **fields})


def right(model, found, count=1, **more):
    """``found`` has so many rewritten blocks, and gives what ``model`` gives."""
    assert [(b.status, b.reason) for b in found.report.blocks] == [("rewritten", "")] * count
    for tokens in (1, 7):
        x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens))
        x[tokens // 2] = torch.nan if tokens > 1 else 0.5
        torch.testing.assert_close(found(x=x, **more), run(model, x=x, **more)[0], rtol=1e-4, atol=1e-5, equal_nan=True)


def reason(model):
    (block,) = optimized(model).report.blocks
    assert block.status == "declined" and block.kind == "moe"
    return block.reason


def test_as_many_as_a_caller_says_are_no_constant():
    """Both made-up calls give the same number, which the next caller does not."""
    file = File()
    number = helper.make_tensor_value_info("k", TensorProto.INT64, [1])
    model = file.model(file.dense(k="k"), [number])
    found = moeopt.optimize(model, {"x": torch.randn(5, H), "k": torch.tensor([1])}, verify="off")
    (block,) = found.report.blocks
    assert block.status == "declined"
    assert "(TopK) chooses as many experts as a value of the graph says that no constant and no size" in block.reason
    x, k = torch.randn(7, H), torch.tensor([3])
    torch.testing.assert_close(found(x=x, k=k), run(model, x=x, k=k)[0])


def test_a_number_that_a_caller_gives_is_no_size_of_a_region():
    """An offset among the ids, alike in both made-up calls."""
    file = File()
    weights, ids, logits = file.router()
    moved = file.node("Mod", file.node("Add", ids, "offset"), file.constant(np.int64(E)))
    experts = file.weighed("x", file.table(weights, moved, logits), lambda x, e: file.expert(x, f"experts.{e}"))
    offset = helper.make_tensor_value_info("offset", TensorProto.INT64, [1])
    model = file.model(experts, [offset])
    found = moeopt.optimize(model, {"x": torch.randn(5, H), "offset": torch.tensor([0])}, verify="fast")
    for number in (0, 1, 3):
        x, given = torch.randn(7, H), torch.tensor([number])
        torch.testing.assert_close(found(x=x, offset=given), run(model, x=x, offset=given)[0], rtol=1e-4, atol=1e-5)


def test_two_blocks_that_share_a_router():
    """The second reads what the first gives, and the router's scores: neither holds the other, and none waits for
    itself."""
    file = File()
    table = file.table(*file.router())
    first = file.weighed("x", table, lambda x, e: file.expert(x, f"a.experts.{e}"))
    second = file.weighed(first, table, lambda x, e: file.expert(x, f"b.experts.{e}"))
    model = file.model(file.node("Add", first, second))
    found = optimized(model)
    right(model, found, count=2)
    assert [b.name for b in found.report.blocks] == ["a", "b"]


def ids_file(file):
    """Rows looked up by ids, and experts by a hash of these."""
    rows = file.node("Gather", file.weight(16, H), "ids")
    kind = file.node("Gather", file.constant(np.arange(16) % E), "ids")
    total = None
    for e in range(E):
        mine = file.node("Unsqueeze", file.node("Equal", kind, file.constant(np.int64(e))), file.constant([-1]))
        part = file.node("Where", mine, file.expert(rows, f"experts.{e}"), file.constant(np.float32(0)))
        total = part if total is None else file.node("Add", total, part)
    model = file.model(total, [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])])
    del model.graph.input[0]
    return model


def test_experts_begin_at_the_rows_of_a_table_and_not_at_its_ids():
    model = ids_file(File())
    found = optimized(model)
    assert [(b.status, b.reason) for b in found.report.blocks] == [("rewritten", "")]
    ids = torch.arange(12).view(3, 4)
    torch.testing.assert_close(found(ids=ids), run(model, ids=ids)[0], rtol=1e-4, atol=1e-5)


def one_hot(file):
    weights, ids, _ = file.router()
    values = file.constant(np.float32([0, 1]))
    chosen = file.node("OneHot", ids, file.constant(np.int64(E)), values, axis=-1)
    table = file.sum(file.node("Mul", chosen, file.node("Unsqueeze", weights, file.constant([-1]))), 1, 0)
    return file.weighed("x", table, lambda x, e: file.expert(x, f"experts.{e}"))


def scaled_by_ones(file):
    return file.dense(
        lambda x, e: file.node("Mul", file.expert(x, f"experts.{e}"), file.constant(np.ones(H, np.float32)))
    )


def sequence(file):
    table = file.table(*file.router())
    results = [file.node("Unsqueeze", file.expert("x", f"experts.{e}"), file.constant([1])) for e in range(E)]
    joined = file.node("ConcatFromSequence", file.node("SequenceConstruct", *results), axis=1)
    return file.sum(file.node("Mul", joined, file.node("Unsqueeze", table, file.constant([-1]))), 1, 0)


def stacked_sequence(file):
    table = file.table(*file.router())
    results = [file.expert("x", f"experts.{e}") for e in range(E)]
    joined = file.node("ConcatFromSequence", file.node("SequenceConstruct", *results), axis=1, new_axis=1)
    return file.sum(file.node("Mul", joined, file.node("Unsqueeze", table, file.constant([-1]))), 1, 0)


def sequence_of_weighed_results(file):
    """All goes through the sequence, which is no value that a block could end with."""
    table = file.table(*file.router())
    columns = [file.node("Gather", table, file.constant([e]), axis=1) for e in range(E)]
    parts = [file.node("Mul", file.expert("x", f"experts.{e}"), column) for e, column in enumerate(columns)]
    return file.sum(file.node("ConcatFromSequence", file.node("SequenceConstruct", *parts), axis=0, new_axis=1), 0, 0)


def gate_among_the_scores(file):
    """The last of the router's columns is no expert's: something else reads it."""
    scores = file.node("MatMul", "x", file.weight(H, E + 1, name="gate"))
    own = file.node("Gather", scores, file.constant([*range(E)]), axis=1)
    values, ids = file.node("TopK", own, file.constant([K]), results=2, axis=-1)
    table = file.table(file.node("Softmax", values, axis=-1), ids, own)
    y = file.weighed("x", table, lambda x, e: file.expert(x, f"experts.{e}"))
    return file.node("Mul", y, file.node("Sigmoid", file.node("Gather", scores, file.constant([E]), axis=1)))


FORMS = [one_hot, scaled_by_ones, sequence, stacked_sequence, sequence_of_weighed_results, gate_among_the_scores]


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_rewritten(form):
    """Constants of a file keep their values: those that change nothing are no reason to decline."""
    file = File()
    model = file.model(form(file))
    right(model, optimized(model))


def test_a_router_of_a_pooled_image():
    file = File()
    pooled = file.node("Flatten", file.node("GlobalAveragePool", "x"))
    table = file.table(*file.router(x=pooled))
    total = None
    for e in range(E):
        inner = file.node("Relu", file.node("Conv", "x", file.weight(I, H, 1, 1, name=f"experts.{e}.up")))
        given = file.node("Conv", inner, file.weight(H, I, 1, 1, name=f"experts.{e}.down"))
        column = file.node("Gather", table, file.constant([e]), axis=1)
        part = file.node("Mul", given, file.node("Reshape", column, file.constant([-1, 1, 1, 1])))
        total = part if total is None else file.node("Add", total, part)
    model = file.model(total)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", H, "h", "w"]))
    found = optimized(model)
    assert [(b.status, b.reason) for b in found.report.blocks] == [("rewritten", "")]
    x = torch.randn(3, H, 4, 5)
    torch.testing.assert_close(found(x=x), run(model, x=x)[0], rtol=1e-4, atol=1e-5)


def test_scores_at_constant_places_are_told_as_broken():
    file = File()
    scores = file.node("MatMul", "x", file.weight(H, E))
    weights = file.node("Softmax", file.node("Gather", scores, file.constant([0, 2]), axis=1), axis=-1)
    total = file.weighed("x", weights, lambda x, e: file.expert(x, f"experts.{2 * e}"), experts=2)
    said = reason(file.model(total))
    assert said.startswith("the file is broken, unless the others are meant for no expert, which a file does not tell")
    assert "of the 4 experts that its router scores, the node 'Gather_" in said and "takes the same 2 for every" in said


def test_rows_from_a_sequence_of_tensors_are_a_reason():
    file = File()
    doubled = file.node("Concat", "x", "x", axis=1)
    several = file.node("SplitToSequence", doubled, file.constant(np.int64(H)), axis=1)
    rows, scored = (file.node("SequenceAt", several, file.constant(np.int64(n))) for n in (0, 1))
    table = file.table(*file.router(x=scored))
    said = reason(file.model(file.weighed(rows, table, lambda x, e: file.expert(x, f"experts.{e}"))))
    assert said.startswith("its nodes read 'splittosequence_") and "', a sequence of tensors, from outside" in said


def test_experts_of_several_widths_are_not_told_as_missing():
    file = File()
    said = reason(file.model(file.dense(lambda x, e: file.expert(x, f"experts.{e}", I if e != 2 else 20))))
    assert said.startswith("its 4 experts have hidden layers of different widths (12, 20), and blocks are cut out of a")
    assert "moeopt.optimize(moeopt.from_onnx(path), inputs, backend='onnxruntime')" in said


def bilinear(file, x):
    row, column = (file.node("Unsqueeze", x, file.constant(axes)) for axes in ([1, 2], [1, 3]))
    left = file.node("MatMul", row, file.weight(6, H, H))
    return file.node("Squeeze", file.node("MatMul", left, column), file.constant([2, 3]))


ALONE = {
    "MatMul": bilinear,
    "ConvTranspose": lambda file, x: file.node(
        "Squeeze",
        file.node("ConvTranspose", file.node("Unsqueeze", x, file.constant([2])), file.weight(H, 6, 1)),
        file.constant([2]),
    ),
}


@pytest.mark.parametrize("operators", ALONE)
def test_experts_that_no_region_is_cut_around_have_an_entry(operators):
    file = File()
    model = file.model(file.dense(lambda x, e: ALONE[operators](file, x)))
    (block,) = optimized(model).report.blocks
    assert (block.kind, block.status, block.experts) == ("moe", "declined", E)
    alone = f"each of its 4 experts has {operators} with constants of its own, and blocks are cut out of a file around"
    assert block.reason.startswith(alone)


def test_vectors_that_a_router_weighs_are_rewritten_as_a_module():
    file = File()
    model = file.model(file.dense(lambda x, e: file.node("Add", file.node("Mul", x, file.weight(H)), file.weight(H))))
    (block,) = optimized(model).report.blocks
    assert (block.kind, block.status, block.experts) == ("moe", "declined", E)
    assert (
        "its experts have no such products" in block.reason and "read as a module it can be rewritten" in block.reason
    )
    module = moeopt.from_onnx(model)
    found = moeopt.optimize(module, module.example, backend="onnxruntime", verify="off")
    assert [(b.status, b.experts) for b in found.report.blocks] == [("rewritten", E)]


def test_branches_that_no_router_weighs_have_no_entry():
    """Halves of one product that gate each other, and rotated halves: constants of their own, and no choice."""
    file = File()
    seen = file.node("Softmax", file.node("MatMul", "x", file.node("Transpose", "x", perm=[1, 0])), axis=-1)
    x = file.node("MatMul", file.node("MatMul", seen, "x"), file.weight(H, H))
    one, two = file.node("Split", x, results=2, axis=1)
    turned = [file.node("Mul", half, file.weight(4)) for half in (one, two)]
    gated = file.node("Mul", one, file.node("Sigmoid", two))
    model = file.model(file.node("Concat", file.node("Add", *turned), gated, axis=1))
    assert optimized(model).report.blocks == ()


def test_a_new_graph_that_does_not_load_is_not_kept(monkeypatch):
    from moeopt.backends.onnxrt import open_engine

    real = open_engine.OnnxEngine

    def stops(directory, signature, *args, **more):
        if any(one["name"] == "x" for one in signature["inputs"]):  # the file's own, and not the blocks' beside it
            monkeypatch.setattr(open_engine, "OnnxEngine", real)  # what is left as it is opens
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : the graph is not acyclic.\nmore")
        return real(directory, signature, *args, **more)

    file = File()
    model = file.model(file.dense())
    monkeypatch.setattr(open_engine, "OnnxEngine", stops)
    said = reason(model)
    assert "does not load the new graph, and it was not kept: [ONNXRuntimeError] : 1 : FAIL : the graph is not" in said


def test_a_name_that_the_file_only_describes_is_taken(tmp_path):
    """Quantisers leave the descriptions of weights that they took away."""
    file = File()
    model = file.model(file.dense())
    optimized(model).save(tmp_path / "first")
    made = onnx.load(tmp_path / "first" / "model.onnx", load_external_data=False).graph
    names = {name for node in made.node for name in node.output} - {name for n in file.nodes for name in n.output}
    model.graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.STRING, [5]) for name in names)
    assert names
    right(model, optimized(model))


def test_a_router_that_an_optimiser_fused_is_none_of_many_experts():
    """``FusedGemm`` turns its weight as ``Gemm`` does: the scores are as many as its rows."""
    file = File()
    fused = {"domain": "com.microsoft", "activation": "Sigmoid", "transB": 1}
    scores = file.node("FusedGemm", "x", file.weight(E, H, name="gate"), **fused)
    values, ids = file.node("TopK", scores, file.constant([K]), results=2, axis=-1)
    table = file.table(values, ids, scores)
    model = file.model(file.weighed("x", table, lambda x, e: file.expert(x, f"experts.{e}")))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    right(model, optimized(model))


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 0, 3, 1]])
def test_experts_in_another_order_than_their_columns(order):
    """Optimisers of graphs turn the order of nodes, and weights without names are in that order."""
    file = File()
    table = file.table(*file.router())
    results = {e: file.expert("x", file.name("w")) for e in order}
    total = None
    for e in range(E):
        part = file.node("Mul", results[e], file.node("Gather", table, file.constant([e]), axis=1))
        total = part if total is None else file.node("Add", total, part)
    model = file.model(total)
    right(model, optimized(model))


def test_a_shared_expert_that_is_added_behind_the_next_block():
    """It begins at the same rows as the first block's experts, with weights of the same shapes, and is none of them."""
    file = File()
    table = file.table(*file.router())
    first = file.node("Add", "x", file.weighed("x", table, lambda x, e: file.expert(x, f"a.{e}")))
    second = file.node("Add", first, file.weighed(first, table, lambda x, e: file.expert(x, f"b.{e}")))
    model = file.model(file.node("Add", second, file.expert("x", "shared")))
    found = optimized(model)
    right(model, found, count=2)
    assert [(b.name, b.experts) for b in found.report.blocks] == [("a", E), ("b", E)]


def normed(file, y):
    """Read twice, for a norm, whose result all goes on."""
    squares = file.node("ReduceMean", file.node("Mul", y, y), axes=[-1])
    return file.node("Mul", y, file.node("Reciprocal", file.node("Sqrt", squares)))


APART = {
    "node": ("MatMul", lambda file, y: y),
    "output": ("MatMul", lambda file, y: y),
    "output, of a norm": ("Mul", normed),
    "output, of its own size": ("Reshape", lambda file, y: file.node("Reshape", y, file.node("Shape", y))),
}


@pytest.mark.parametrize("by", APART)
def test_a_result_that_is_read_beside_the_sum_is_told(by):
    file, kept = File(), []
    maker, behind = APART[by]

    def expert(x, e):
        kept.append(behind(file, file.expert(x, f"experts.{e}")))
        return kept[-1]

    total = file.dense(expert)
    model = file.model(total)
    beside = file.node("Tanh", kept[1]) if by == "node" else kept[1]
    model.graph.node.extend(file.nodes[len(model.graph.node) :])
    model.graph.output.append(helper.make_tensor_value_info(beside, TensorProto.FLOAT, None))
    said = reason(model)
    makers = {name: node.name for node in file.nodes for name in node.output}
    reader = next(n.name for n in file.nodes if n.op_type == "Mul" and kept[1] in n.input)
    apart = f"the node {makers[beside]!r} (Tanh)" if by == "node" else "the graph as an output"
    assert said.startswith(
        f"the result of one of its experts (the node {makers[kept[1]]!r}, {maker}) is read by the node {reader!r} "
        f"(Mul) and by {apart}, and the op gives the sum of the experts alone: export the model without what reads an"
    )


def test_a_block_of_a_file_as_a_module_stands_in_no_line_of_python():
    """Neither in that of the caller, nor in that of the command's library."""
    file = File()
    module = moeopt.from_onnx(file.model(file.dense(lambda x, e: file.node("MatMul", x, file.weight(H, H)))))
    (block,) = moeopt.explain(module, torch.randn(5, H)).blocks
    assert (block.status, block.experts, block.source) == ("declined", E, "")


@pytest.mark.parametrize("between", [False, True])
def test_alike_blocks_that_one_table_weighs_are_several(between):
    """From the same rows, their experts one block after the other, or each expert of one beside that of the other."""
    file, sums = File(opset=18), {}
    table = file.table(*file.router())
    order = [(e, b) for e in range(E) for b in "ab"] if between else [(e, b) for b in "ab" for e in range(E)]
    for e, b in order:
        column = file.node("Gather", table, file.constant([e]), axis=1)
        part = file.node("Mul", file.expert("x", f"{b}.experts.{e}"), column)
        sums[b] = file.node("Add", sums[b], part) if b in sums else part
    model = file.model(file.node("Mul", *sums.values()))
    found = optimized(model)
    right(model, found, count=2)
    assert [(b.name, b.experts, b.top_k) for b in found.report.blocks] == [("a", E, K), ("b", E, K)]


def test_a_router_that_a_caller_may_replace_stays_an_input(tmp_path):
    """It is an input with a value of its own: a region reads it as what flows in."""
    file = File()
    model = file.model(file.dense())
    (gate,) = [t for t in model.graph.initializer if t.name.startswith("gate")]
    model.graph.input.append(helper.make_tensor_value_info(gate.name, gate.data_type, list(gate.dims)))
    found = optimized(model)
    right(model, found)
    x, other = torch.randn(5, H), torch.randn(H, E)
    new = onnx.load(found.save(tmp_path / "bundle") / "model.onnx")
    feeds = {"x": x, gate.name: other}
    torch.testing.assert_close(run(new, **feeds)[0], run(model, **feeds)[0], rtol=1e-4, atol=1e-5)
