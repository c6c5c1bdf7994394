"""The softmax over the kept experts; each twin needs the whole one, or is none that may be shrunk."""

import pytest
import torch

from moeopt.passes import shrink_router_softmax
from moeopt.passes.shrink_router_softmax import ShrinkRouterSoftmax
from moeopt.rewrite.install import run
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, seeded, through

aten = torch.ops.aten
X = rand(6, H)


class Float(MoE):
    """In bfloat16 with a softmax in float32, as Mixtral has it."""

    def __init__(self):
        super().__init__()
        self.bfloat16()

    def route(self, x):
        w, ids = self.router(x).softmax(-1, dtype=torch.float32).topk(self.top_k)
        return (w / w.sum(-1, keepdim=True)).to(x.dtype), ids


@pytest.mark.parametrize(("make", "x"), [(MoE, X), (Float, X.bfloat16())])
def test_fires_and_agrees(make, x):
    rewrite, records = through(make, ShrinkRouterSoftmax(), x=x)
    record, graph = records["shrink_router_softmax"], rewrite.program.block.graph
    assert (record.fired, record.verified) == (1, True)
    assert "sum" not in record.after and "div" not in record.after and record.after["_softmax"] == 1
    (softmax,) = [n for n in graph.nodes if n.target is aten._softmax.default]
    (topk,) = [n for n in graph.nodes if n.target is aten.topk.default]
    assert softmax.args[0].args[0] is topk and softmax.meta["shape"][-1] == make.top_k
    without, _ = through(make, x=x)
    module, fresh = seeded(make), rand(40, H, seed=5).to(x.dtype)
    got, want = (run(r.program.block, module, fresh) for r in (rewrite, without))
    # each weight moves by some eps of float32; a bfloat16 weight may then round to its neighbour
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(got, want, rtol=8 * eps, atol=8 * eps)


class NotRenormalised(MoE):
    def route(self, x):
        return self.router(x).softmax(-1).topk(self.top_k)


class OtherSum(MoE):
    def route(self, x):
        p = self.router(x).softmax(-1)
        w, ids = p.topk(self.top_k)
        return w / p.sum(-1, keepdim=True), ids


class OverAllTokens(MoE):
    """Divides by one number."""

    def route(self, x):
        w, ids = self.router(x).softmax(-1).topk(self.top_k)
        return w / w.sum(), ids


class AcrossSlots(MoE):
    """Divides each slot by its sum over the tokens."""

    def route(self, x):
        w, ids = self.router(x).softmax(-1).topk(self.top_k)
        return w / w.sum(0, keepdim=True), ids


class AuxLoss(MoE):
    def forward(self, x):
        p = self.router(x).softmax(-1)
        w, ids = p.topk(self.top_k)
        return self.mix(x, w / w.sum(-1, keepdim=True), ids), p.mean(0)


class KeepsTheWeights(MoE):
    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(self.top_k)
        return self.mix(x, w / w.sum(-1, keepdim=True), ids), w.amax(0)


class Narrow(MoE):
    def __init__(self):
        super().__init__()
        self.bfloat16()


class Smallest(MoE):
    def route(self, x):
        w, ids = self.router(x).softmax(-1).topk(self.top_k, largest=False)
        return w / w.sum(-1, keepdim=True), ids


class WithEpsilon(MoE):
    def route(self, x):
        w, ids = self.router(x).softmax(-1).topk(self.top_k)
        return w / (w.sum(-1, keepdim=True) + 1e-9), ids


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (NotRenormalised, ""),
        (OtherSum, ""),
        (Smallest, ""),
        (WithEpsilon, ""),
        (OverAllTokens, ""),
        (AcrossSlots, ""),
        (AuxLoss, "the router's softmax is also read by mean (at "),
        (KeepsTheWeights, "the router's top-k is also read by amax (at "),
        (Narrow, "the router softmax runs in torch.bfloat16; only float32 keeps ties rare (at "),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_declines_with_a_reason(make, reason):
    rewrite, records = through(make, ShrinkRouterSoftmax(), x=X.bfloat16() if make is Narrow else X)
    record = records["shrink_router_softmax"]
    assert record.fired == 0 and record.before == record.after and rewrite.check.passed is True
    assert record.reason.startswith(reason) and bool(record.reason) == bool(reason)


def test_a_wrong_rewrite_would_be_caught(monkeypatch):
    def not_renormalised(graph, one):
        one.weights.replace_all_uses_with(one.kept)
        graph.erase_node(one.weights)

    monkeypatch.setattr(shrink_router_softmax, "shrink", not_renormalised)
    rewrite, records = through(MoE, ShrinkRouterSoftmax())
    assert records["shrink_router_softmax"].reason.startswith("reverted: the block is not equivalent with it: case ")
    assert rewrite.check.passed is True


def test_it_is_off_until_named():
    """Rows so small that every probability is the same: the model takes the first experts, the logits name others."""
    records = through(MoE, ShrinkRouterSoftmax(), only=[])[1]
    assert records["shrink_router_softmax"].reason.startswith(
        "off: where two logits round to one probability it takes "
    )
    logits = torch.tensor([[1e-30, 2e-30, 3e-30, 4e-30]])
    assert logits.softmax(-1).topk(2).indices.tolist() != logits.topk(2).indices.tolist()
