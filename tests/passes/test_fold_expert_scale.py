"""A constant factor goes into the weights; each twin has a factor that cannot."""

import pytest
import torch

import moeopt
from moeopt.passes import fold_expert_scale
from moeopt.passes.fold_expert_scale import FoldExpertScale
from moeopt.rewrite.install import run
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, seeded, through

X = rand(6, H)


class Scaled(MoE):
    """The smallest block with a factor; each twin changes one thing."""

    def forward(self, x):
        return super().forward(x) * 2.5


class Sequence(MoE):
    """The factor comes after the sum was put into the input's shape, as a division, and something is added to it."""

    def forward(self, x):
        y = super().forward(x.reshape(-1, H)).view_as(x)
        return y / -4 + x


@pytest.mark.parametrize(("make", "shape", "op"), [(Scaled, (6, H), "mul"), (Sequence, (2, 3, H), "div")])
def test_fires_and_agrees(make, shape, op):
    rewrite, records = through(make, FoldExpertScale(), x=rand(*shape))
    record, block = records["fold_expert_scale"], rewrite.program.block
    assert (record.fired, record.verified) == (1, True)
    assert record.after["mul"] == 1 and record.after.get("div", 0) == (
        1 if make is Scaled else record.before["div"] - 1
    )
    (experts,) = block.experts_nodes()
    factor = experts.args[4]
    assert factor.target is torch.ops.aten.mul.Tensor and factor.args[1] == (2.5 if op == "mul" else -0.25)
    assert (block.routers[0] is None) == (op == "div")  # no router promises weights below zero
    x = rand(*[n + 3 for n in shape[:-1]], H, seed=4)
    module = seeded(make)
    # float32: two roundings in another place, and the sum in another order
    torch.testing.assert_close(run(block, module, x), module(x), rtol=1e-5, atol=1e-6)


class ReadTwice(MoE):
    def forward(self, x):
        y = super().forward(x)
        return y * 2.5 + y


class ByATensor(MoE):
    def __init__(self):
        super().__init__(scale=torch.nn.Parameter(torch.full((H,), 2.5)))

    def forward(self, x):
        return super().forward(x) * self.scale


class OnTheInput(MoE):
    """The weight multiplies what goes into each expert."""

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, expert(x[t] * w[t, k, None]))
        return y * 2.5


class Narrow(MoE):
    def __init__(self):
        super().__init__()
        self.bfloat16()

    def forward(self, x):
        return super().forward(x) * 2.5


class Wider(MoE):
    def __init__(self):
        super().__init__()
        self.bfloat16()

    def forward(self, x):
        return super().forward(x).float() * 2.5


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ReadTwice, ""),
        (ByATensor, ""),
        (OnTheInput, "the routing weights multiply the experts' input, and an activation follows (at "),
        (Narrow, "the routing weights are torch.bfloat16, in which a product with 2.5 is rounded (at "),
        (Wider, ""),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_declines_with_a_reason(make, reason):
    x = X.bfloat16() if make in (Narrow, Wider) else X
    record = through(make, FoldExpertScale(), x=x)[1]["fold_expert_scale"]
    assert record.fired == 0 and record.before == record.after
    assert record.reason.startswith(reason) and ("test_fold_expert_scale.py:" in record.reason) == bool(reason)


def test_a_power_of_two_goes_into_narrow_weights_as_well():
    class Half(Narrow):
        def forward(self, x):
            return MoE.forward(self, x) * 0.5

    assert through(Half, FoldExpertScale(), x=X.bfloat16())[1]["fold_expert_scale"].fired == 1


def test_pytorch_is_left_alone():
    records = {r.name: r for r in moeopt.optimize(seeded(Scaled), X).report.passes}
    assert records["fold_expert_scale"].reason.startswith("for engines only: in PyTorch it saves less than can be ")


def test_a_wrong_factor_would_be_caught(monkeypatch):
    def squared(block, one, fold=fold_expert_scale.fold):
        fold(block, fold_expert_scale.Scaled(one.experts, one.node, one.factor**2))

    monkeypatch.setattr(fold_expert_scale, "fold", squared)
    rewrite, records = through(Scaled, FoldExpertScale())
    assert records["fold_expert_scale"].reason.startswith("reverted: the block is not equivalent with it: case ")
    assert rewrite.check.passed is True
