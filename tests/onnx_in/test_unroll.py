"""Loops over experts that run a fixed number of times are written out; other bodies stay, each with a reason."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import moeopt
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.unroll import unrolled
from tests.onnx_in.bodies import _ROUTER, BRANCH, GATHERED, LOOP, SCAN, E, H, model

FORMS = {"Loop": LOOP, "Loop, its results gathered": GATHERED, "Scan": SCAN, "Loop in an If": BRANCH}


def run(proto, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return torch.from_numpy(onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, x)[0])


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_it_did_in_the_main_graph_alone(form):
    given = model(FORMS[form])
    before = given.SerializeToString()
    made = unrolled(read_onnx(given)).proto
    assert given.SerializeToString() == before
    assert not {"Loop", "Scan", "If"} & {node.op_type for node in made.graph.node}
    x = {"x": np.random.default_rng(1).normal(size=(5, H)).astype(np.float32)}
    assert torch.equal(run(made, x), run(given, x))


@pytest.mark.parametrize("form", ["Scan", "Loop in an If"])
def test_its_experts_are_rewritten(form):
    given = model(FORMS[form])
    found = moeopt.optimize(given, verify="fast")
    assert [(b.status, b.experts, b.top_k) for b in found.report.blocks] == [("rewritten", E, 2)]
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(found(x), run(given, {"x": x.numpy()}), rtol=1e-5, atol=1e-5)


def test_a_file_whose_loop_is_written_out_is_a_module():
    given, x = model(LOOP), torch.randn(6, H, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(moeopt.from_onnx(given)(x), run(given, {"x": x.numpy()}), rtol=1e-5, atol=1e-6)


STAYS = {
    "how often is not known": (LOOP, {"takes": "float[t, 8] x, int64 trips"}),
    "it may stop": (LOOP.replace("again = Identity(go)", "most = ReduceMax(w)\n again = Cast <to = 9> (most)"), {}),
    "it is long": (LOOP, {"trips": np.array(1 << 20)}),
    "the caller decides": (BRANCH, {"takes": "float[t, 8] x, bool yes"}),
    "it does not run": (LOOP, {"trips": np.array(0)}),
}


@pytest.mark.parametrize("why", STAYS)
def test_what_is_not_fixed_stays_a_body(why):
    text, fields = STAYS[why]
    file = read_onnx(model(text, **fields))
    assert unrolled(file) is file


def test_a_block_in_a_body_that_stays_is_told_by_the_node():
    text, fields = STAYS["it may stop"]
    found = moeopt.optimize(model(text, **fields))
    (block,) = found.report.blocks
    assert block.status == "declined" and block.experts == E
    assert "it stands in a body of the node 'loop_4' (Loop)" in block.reason
    assert "a loop is written out where its number of rounds is a constant and its condition stays true" in block.reason


def test_a_loop_without_experts_stays_as_it_is():
    text = """
    y = Loop (trips, yes, x) <body = body (int64 e, bool go, float[t, 8] y_in) => (bool again, float[t, 8] y_out) {
        y_out = Add(y_in, y_in)
        again = Identity(go)
    }>
"""
    file = read_onnx(model(text))
    assert unrolled(file) is file


MIXING = LOOP.replace("b = Relu(a)", "b = CumSum(a, first)")
"""Experts that mix rows: declined."""
SECOND = LOOP.replace(_ROUTER, "").replace("y = Loop", "z = Loop").replace("MatMul(x, u)", "MatMul(y, u)")
"""Experts behind these, with their router."""
UNREAD = MIXING.replace("b = CumSum(a, first)", "n = CumSum(a, first)\n b, NONE = Dropout(n)")
"""A node in the body, and one outside, with a result that nobody asked for."""
AS_THEY_STOOD = {
    "one loop": MIXING + SECOND,
    "results without a name": UNREAD
    + "other, NONE = Dropout(y)\n"
    + SECOND.replace("MatMul(y, u)", "MatMul(other, u)"),
}


def nameless(graph):
    """The graph with results that have no name where they are called ``NONE``."""
    for node in graph.node:
        node.output[:] = ["" if name == "NONE" else name for name in node.output]
        for attribute in node.attribute:
            nameless(attribute.g)


def bundled(given, directory):
    """The new graph, after a comparison with the file in another size."""
    found = moeopt.optimize(given, verify="off")
    found.save(directory / "bundle")
    x = {"x": np.random.default_rng(1).normal(size=(5, H)).astype(np.float32)}
    torch.testing.assert_close(
        moeopt.load(directory / "bundle")(**{k: torch.from_numpy(v) for k, v in x.items()}), run(given, x)
    )
    return found, onnx.load(directory / "bundle" / "model.onnx", load_external_data=False).graph


@pytest.mark.parametrize("what", AS_THEY_STOOD)
def test_a_loop_that_was_written_out_for_nothing_stands_as_it_stood(what, tmp_path):
    """Its experts mix rows; those of the other loop are rewritten."""
    given = model(AS_THEY_STOOD[what])
    given.graph.output[0].name = "z"
    nameless(given.graph)
    told = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["t", H])  # which the new block reads
    given.graph.value_info.append(told)
    _, made = bundled(given, tmp_path)
    found = [node for node in made.node if node.op_type == "Loop"]
    assert found == [given.graph.node[4]] and given.graph.node[4].op_type == "Loop"
    assert list(made.value_info) == [told]
    assert not [t.name for t in made.initializer if t.name.startswith(("unrolled", "loop_4"))]


def test_a_branch_that_is_never_taken_may_read_what_a_rewritten_block_was(tmp_path):
    """The other one holds experts that are declined, and stays written out: nobody gives what the first reads."""
    first = LOOP.replace("b = Relu(a)", "b = CumSum(a, first)").replace("y = Loop", "y_then = Loop")
    again = first.replace(_ROUTER, "none_yet = Mul(h, none)").replace("yes, zero", "yes, none_yet")
    text = _ROUTER + "".join(
        f"""
    a{e} = MatMul(x, u{e})
    b{e} = Relu(a{e})
    c{e} = MatMul(b{e}, d{e})
    hit{e} = Equal(ids, n{e})
    m{e} = Cast <to = 1> (hit{e})
    t{e} = Mul(m{e}, weights)
    w{e} = ReduceSum (t{e}, last)
    part{e} = Mul(c{e}, w{e})
"""
        for e in range(E)
    )
    text += f"""
    s1 = Add(part0, part1)
    s2 = Add(s1, part2)
    s3 = Add(s2, part3)
    h = Tanh(s3)
    y = If (yes) <then_branch = all () => (float[t, 8] y_then) {{
        {again.replace("MatMul(x, u)", "MatMul(h, u)")}
    }}, else_branch = none () => (float[t, 8] y_else) {{
        y_else = Add(h, c1)
    }}>
"""
    draw = np.random.default_rng(2)
    held = {f"u{e}": draw.normal(size=(H, 12)) for e in range(E)} | {f"n{e}": np.array(e) for e in range(E)}
    found, made = bundled(model(text, **held, **{f"d{e}": draw.normal(size=(12, H)) for e in range(E)}), tmp_path)
    assert [b.status for b in found.report.blocks] == ["rewritten", "declined"]
    assert "CumSum" in {node.op_type for node in made.node}
