"""A shared expert like the routed ones becomes one of them; each twin has one that is none."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.passes import merge_shared_expert
from moeopt.passes.merge_shared_expert import MergeSharedExpert
from moeopt.rewrite.install import run
from tests.capture.tiny import rand
from tests.recognise.tiny import GLU, E, H, I, MoE, ffn, seeded, through

X = rand(6, H)


class Shared(MoE):
    """The smallest block with a shared expert; each twin changes one thing."""

    def __init__(self, shared=ffn, **parts):
        super().__init__(shared=shared(), **parts)

    def forward(self, x):
        return super().forward(x) + self.shared(x)


class Gated(Shared):
    """A sequence, with a gate of the shared expert's own."""

    def __init__(self):
        super().__init__(gate=nn.Linear(H, 1))

    def forward(self, x):
        rows = x.reshape(-1, H)
        return (torch.sigmoid(self.gate(rows)) * self.shared(rows) + MoE.forward(self, rows)).view_as(x)


class Capacity(Shared):
    """Each expert takes three tokens; ids that are too many name no expert, E of them."""

    def route(self, x):
        w, ids = super().route(x)
        place = torch.nn.functional.one_hot(ids, E).flatten(0, 1).cumsum(0).view(*ids.shape, E)
        return w, torch.where(place.gather(-1, ids[..., None])[..., 0] <= 3, ids, E)


@pytest.mark.parametrize(("make", "shape"), [(Shared, (6, H)), (Gated, (2, 3, H)), (Capacity, (12, H))])
def test_fires_and_agrees(make, shape):
    rewrite, records = through(make, MergeSharedExpert(), x=rand(*shape), only=["group_experts", "merge_shared_expert"])
    record, block = records["merge_shared_expert"], rewrite.program.block
    assert (record.fired, record.verified) == (1, True), record.reason
    assert len(block.weights[0].experts) == E + 1 and "shared" not in block.kept_modules
    assert block.weights[0].experts[E].w_out.path == "shared.2.weight" and block.routers == [None]
    module, x = seeded(make), rand(*[n + 2 for n in shape[:-1]], H, seed=4)
    # float32: the shared expert's term is added in the sum's order
    torch.testing.assert_close(run(block, module, x), module(x), rtol=1e-5, atol=1e-6)


class OnOtherTokens(Shared):
    def forward(self, x):
        return MoE.forward(self, x) + self.shared(x * 2)


class Returned(Shared):
    def forward(self, x):
        s = self.shared(x)
        return MoE.forward(self, x) + s, s


class WideGate(Shared):
    def forward(self, x):
        return MoE.forward(self, x) + torch.sigmoid(x) * self.shared(x)


class Hooked(Shared):
    def __init__(self):
        super().__init__()
        self.shared[1].register_forward_hook(lambda module, args, result: None)


class OnTheInput(Shared):
    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, expert(x[t] * w[t, k, None]))
        return y


def shared_of(make):
    return type("Shared", (Shared,), {"__init__": lambda self: Shared.__init__(self, make)})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OnOtherTokens, ""),
        (Returned, ""),
        (WideGate, "shared is multiplied by more than one number for each token (at "),
        (Hooked, "shared has a hook or another forward, which would no longer run (at "),
        (OnTheInput, "the routing weights multiply the experts' input, so an expert of weight 1 has no gate (at "),
        (shared_of(lambda: ffn(nn.GELU)), "shared is another function than the routed experts (activation gelu, not "),
        (shared_of(lambda: ffn(inner=I + 4)), f"shared has {I + 4} neurons, the routed experts {I} (at "),
        (shared_of(GLU), "shared is another function than the routed experts (rows separate, not plain) (at "),
        (shared_of(lambda: nn.Sequential(ffn(), ffn())), "shared is more than one feed-forward network (at "),
        (shared_of(lambda: nn.Linear(H, H)), "shared is more than one feed-forward network (at "),
    ],
)  # fmt: skip
def test_declines_with_a_reason(make, reason):
    rewrite, records = through(make, MergeSharedExpert(), only=["group_experts", "merge_shared_expert"])
    record = records["merge_shared_expert"]
    assert record.fired == 0 and record.before == record.after and rewrite.check.passed is True
    assert record.reason.startswith(reason) and bool(record.reason) == bool(reason)


def test_it_is_off_until_named():
    records = {r.name: r for r in moeopt.optimize(seeded(Shared), X).report.passes}
    assert records["merge_shared_expert"].reason.startswith("off: stacked weights cannot gain an expert without a copy")
    named = moeopt.optimize(seeded(Shared), X, only_passes=("group_experts", "merge_shared_expert"))
    assert {r.name: r.fired for r in named.report.passes}["merge_shared_expert"] == 1
    assert named.certificate.passed is True
    torch.testing.assert_close(named(X), seeded(Shared)(X), rtol=1e-5, atol=1e-6)


def test_changed_weights_and_hooks_of_the_shared_expert_are_seen():
    opt = moeopt.optimize(seeded(Shared), X, only_passes=("group_experts", "merge_shared_expert"))
    with torch.no_grad():
        opt.model.shared[2].weight.mul_(2)
    original = seeded(Shared)
    original.load_state_dict(opt.model.state_dict())
    torch.testing.assert_close(opt(X), original(X), rtol=1e-5, atol=1e-6)
    opt.model.shared[1].register_forward_hook(lambda module, args, result: result * 0)
    with pytest.warns(UserWarning, match="a hook was registered on shared.1, which is no longer called"):
        opt(X)


def test_a_wrong_merge_would_be_caught(monkeypatch):
    """The shared expert without its last bias."""

    def read(block, one, read=merge_shared_expert.read):
        weights = read(block, one)
        return weights.__class__(weights.w_in, weights.b_in, weights.w_out, None)

    monkeypatch.setattr(merge_shared_expert, "read", read)
    _, records = through(Shared, MergeSharedExpert(), only=["group_experts", "merge_shared_expert"])
    assert records["merge_shared_expert"].reason.startswith("reverted: the block is not equivalent with it: case ")
