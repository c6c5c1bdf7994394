"""Experts that each stand in a branch which runs them where they have rows: written out where the other one is idle."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import moeopt
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.unroll import unrolled
from tests.onnx_in.bodies import E, H, model

I, K = 12, 2
ROUTER = """
    logits = MatMul(x, gate)
    probs = Softmax <axis = -1> (logits)
    weights, ids = TopK <axis = -1> (probs, two)
    y0 = Mul(x, none)
"""
ROWS = """
    mask{e} = Equal(ids, n{e})
    place{e} = NonZero(mask{e})
    row{e} = Gather <axis = 0> (place{e}, n0)
    mine{e} = Gather <axis = 0> (x, row{e})
    late{e} = Slice(mine{e}, first, huge, first)
    tail{e} = Slice(mine{e}, second, huge, first)
    each{e} = Cast <to = 7> (mask{e})
    count{e} = ReduceSum <keepdims = 0> (each{e})
    most{e} = ReduceMax <keepdims = 0> (each{e})
    flags{e} = Cast <to = 1> (mask{e})
    shares{e} = Mul(flags{e}, weights)
    share{e} = ReduceSum(shares{e}, last)
    sum{e} = ReduceSum <keepdims = 0> (shares{e})
    size{e} = {measure}
    is{e} = {asks}
"""
EXPERT = "a = MatMul({rows}, up{e})\n b = Relu(a)\n c = MatMul(b, down{e})\n"
SPARSE = (
    EXPERT.replace("{rows}", "mine{e}")
    + """turned = Transpose(place{e})
    w = GatherND(weights, turned)
    column = Unsqueeze(w, last)
    part = Mul(c, column)
    at = Unsqueeze(row{e}, last)
    z = ScatterND <reduction = "add"> (y{e}, at, part)"""
)
DENSE = EXPERT.replace("{rows}", "x") + "part = Mul(c, share{e})\n z = Add(y{e}, part)"
OVERWRITTEN = SPARSE.replace('reduction = "add"', 'reduction = "none"')
IDLE = "z = Identity(y{e})"


def branches(computes=SPARSE, idle=IDLE, measure="Size(mine{e})", asks="Greater(size{e}, n0)", turned=False):
    """A file with an ``If`` for each expert."""
    then, other = (idle, computes) if turned else (computes, idle)
    text = ROUTER + "".join(
        (ROWS.replace("{measure}", measure).replace("{asks}", asks)).replace("{e}", str(e))
        + f"\n y{e + 1} = If (is{e}) <then_branch = t () => (float[t, 8] z) {{ {then} }}, ".replace("{e}", str(e))
        + f"else_branch = f () => (float[t, 8] z) {{ {other} }}>\n".replace("{e}", str(e))
        for e in range(E)
    )
    draw = np.random.default_rng(4)
    held = {f"n{e}": np.array(e) for e in range(E)} | {"huge": np.array([1 << 62]), "second": np.array([1])}
    held |= {f"up{e}": draw.normal(size=(H, I)) for e in range(E)}
    held |= {f"down{e}": draw.normal(size=(I, H)) for e in range(E)} | {"eight": np.array(H)}
    return model(text.replace(f"y{E} = If", "y = If"), **held)


def run(proto, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return torch.from_numpy(onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})[0])


ALWAYS = {
    "how many numbers its rows are": {},
    "the first of their sizes": {"measure": "Shape(mine{e})", "asks": "GREATER"},
    "rows from the first one on": {"measure": "Size(late{e})"},
    "no less than one": {"measure": "Size(row{e})", "asks": "GreaterOrEqual(size{e}, n1)"},
    "not none": {"asks": "Equal(size{e}, n0)", "turned": True},
    "less than one": {"asks": "Less(size{e}, n1)", "turned": True},
    "none is less": {"asks": "Less(n0, size{e})"},
    "its mask": {"measure": "Identity(most{e})", "asks": "Cast <to = 9> (size{e})"},
    "a count": {"measure": "Identity(count{e})"},
    "rows that are overwritten": {"computes": OVERWRITTEN},
}
ONLY_FINITE = {
    "a mask": {"computes": DENSE, "measure": "Identity(most{e})", "asks": "Cast <to = 9> (size{e})"},
    "its count": {"computes": DENSE, "measure": "Identity(count{e})"},
}
DIFFERENT = {
    "the other branch passes rows on": {"idle": "z = Add(y{e}, x)"},
    "rows from the second one on": {"measure": "Size(tail{e})"},
    "something else is added": {"computes": SPARSE.replace("z = S", "q = S") + "\n z = Add(q, x)"},
}
OTHER_QUESTIONS = {
    "more than one row": "Greater(size{e}, eight)",
    "the sum of its weights": "Greater(sum{e}, none)",
}


@pytest.fixture(scope="module")
def rows():
    """Rows of which some experts get none, and one row."""
    x = np.random.default_rng(1).normal(size=(1, H)).astype(np.float32)
    return [np.repeat(x, 3, 0), x, np.zeros((2, H), np.float32)]


def made(fields):
    if fields.get("asks") == "GREATER":
        fields = fields | {"measure": "Shape <start = 0, end = 1> (mine{e})", "asks": "Greater(size{e}, n0)"}
    return branches(**fields)


@pytest.mark.parametrize("why", ALWAYS)
def test_a_branch_that_changes_nothing_without_rows_is_written_out(why, rows):
    given = made(ALWAYS[why])
    found = unrolled(read_onnx(given)).proto
    assert "If" not in {node.op_type for node in found.graph.node}
    for x in rows:
        assert torch.equal(run(found, x), run(given, x))


@pytest.mark.parametrize("why", ONLY_FINITE)
def test_zeros_times_a_result_are_written_out_only_where_the_experts_are_rewritten(why, rows):
    file = read_onnx(made(ONLY_FINITE[why]))
    assert unrolled(file) is file
    found = unrolled(file, finite=True).proto
    assert "If" not in {node.op_type for node in found.graph.node}
    for x in rows:
        assert torch.allclose(run(found, x), run(file.proto, x), rtol=1e-6, atol=1e-7)
    large = np.full((1, H), 1e37, np.float32)  # experts that it does not choose overflow
    assert run(file.proto, large).isfinite().all() or not run(found, large).isfinite().all()


@pytest.mark.parametrize("why", DIFFERENT)
def test_branches_that_differ_without_rows_stay_and_say_which_nodes_do(why):
    file = read_onnx(branches(**DIFFERENT[why]))
    assert unrolled(file, finite=True) is file
    (block,) = moeopt.optimize(file.proto).report.blocks
    assert (block.status, block.experts) == ("declined", E)
    assert (
        "where the condition of the node 'if_" in block.reason and "says that no row chose the expert" in block.reason
    )
    assert "its branches are not seen to give the same, but the node 'z' (" in block.reason


@pytest.mark.parametrize("why", OTHER_QUESTIONS)
def test_other_questions_stay_and_are_told(why):
    file = read_onnx(branches(asks=OTHER_QUESTIONS[why]))
    assert unrolled(file, finite=True) is file
    (block,) = moeopt.optimize(file.proto).report.blocks
    assert (block.status, block.experts) == ("declined", E)
    assert "decides by, the node 'greater_" in block.reason
    assert "is not seen to say that no row chose the expert. Export the model without those branches" in block.reason


class Hit(nn.Module):
    """Experts run where a token is there for them. (T, H) -> (T, H)"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H)) for _ in range(E)])

    def forward(self, x):
        weights, ids = torch.softmax(self.gate(x), -1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            place = torch.nonzero(ids == number)
            row, slot = place[:, 0], place[:, 1]
            token = x[row]
            if token.numel() > 0:
                y = y.index_add(0, row, expert(token) * weights[row, slot].unsqueeze(-1))
        return y


class AnyHit(Hit):
    def forward(self, x):
        weights, ids = torch.softmax(self.gate(x), -1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = ids == number
            if mask.any():
                y = y + expert(x) * (mask * weights).sum(-1, keepdim=True)
        return y


class Conditional(Hit):
    def forward(self, x):
        weights, ids = torch.softmax(self.gate(x), -1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = ids == number
            share = (mask * weights).sum(-1, keepdim=True)
            y = y + torch.cond(
                mask.any(), lambda x, s, run=expert: run(x) * s, lambda x, s: torch.zeros_like(x), (x, share)
            )
        return y


@pytest.mark.parametrize(
    "form", [Hit, pytest.param(AnyHit, marks=pytest.mark.nightly), pytest.param(Conditional, marks=pytest.mark.nightly)]
)
def test_a_file_that_torch_wrote_of_branches_is_rewritten(form, tmp_path):
    torch.manual_seed(0)
    path, free = str(tmp_path / "home.onnx"), {"x": {0: "t"}}
    model, x = form().eval(), torch.randn(7, H)
    if form is Conditional:
        sizes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(model, (x,), path, dynamo=True, input_names=["x"], dynamic_shapes=sizes, verbose=False)
    else:
        scripted = torch.jit.script(model)
        torch.onnx.export(scripted, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=free, opset_version=17)
    assert "If" in {node.op_type for node in read_onnx(path).proto.graph.node}
    found = moeopt.optimize(path, verify="fast")
    assert [(b.status, b.experts, b.top_k) for b in found.report.blocks] == [("rewritten", E, K)]
    session = onnxruntime.InferenceSession(path)
    odd = torch.cat([torch.randn(2, H), torch.full((1, H), torch.nan), torch.zeros(1, H)])
    for x in (torch.randn(1, H), torch.randn(1, H).repeat(5, 1), torch.zeros(3, H), torch.randn(4, H) * 1e30, odd):
        want = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(found(x), want, rtol=1e-4, atol=1e-5, equal_nan=True)
