"""Copies and idle views go where nobody can tell, to the same bits; each twin has one that somebody could."""

import pytest
import torch
from torch import nn

from moeopt.passes import drop_copies
from moeopt.passes.drop_copies import DropCopies
from moeopt.rewrite.install import run
from tests.capture.tiny import rand
from tests.recognise.tiny import H, HandsOn, MoE, seeded, through

X = rand(6, H)


class Keeps(MoE):
    """The smallest block with a copy that is dropped: what it kept for a later sum."""

    def forward(self, x):
        residual = x.clone()
        return super().forward(x) + residual


class OfTheSum(MoE):
    """A copy of a fresh tensor: its layout is known, so anything may follow."""

    def __init__(self):
        super().__init__(head=nn.Parameter(torch.ones(H, H)))

    def forward(self, x):
        return super().forward(x).clone() @ self.head


class Views(MoE):
    """Three views that give back all of the sum."""

    def forward(self, x):
        y = super().forward(x)
        return y.view(y.shape).permute(0, 1).expand(-1, H) * 3


@pytest.mark.parametrize(("make", "ops", "fired"), [(Keeps, "clone", 1), (OfTheSum, "clone", 1), (Views, "permute", 3)])
def test_fires_to_the_same_bits(make, ops, fired):
    without, _ = through(make)
    rewrite, records = through(make, DropCopies())
    record = records["drop_copies"]
    assert (record.fired, record.verified, record.reason) == (fired, True, "")
    assert sum(record.before.values()) - sum(record.after.values()) >= fired and ops not in record.after
    for x in (X, rand(1, H), rand(19, H, seed=2)):
        module = seeded(make)
        assert torch.equal(run(rewrite.program.block, module, x), run(without.program.block, module, x))


class Returned(MoE):
    def forward(self, x):
        return super().forward(x), x.clone()


class ReturnedView(MoE):
    def forward(self, x):
        return super().forward(x), x.clone()[:, 1:]


class Stored(MoE):
    def forward(self, x):
        self.seen = x.clone()
        return super().forward(x) + self.seen


class HandedOn(MoE):
    """A module may return its own argument."""

    def __init__(self):
        super().__init__(same=HandsOn())

    def forward(self, x):
        return super().forward(x) + self.same(x.clone())


class BeforeAProduct(MoE):
    """The operand may be strided, and a product of strided rows may take another kernel."""

    def __init__(self):
        super().__init__(head=nn.Parameter(torch.ones(H, H)))

    def forward(self, x):
        return super().forward(x) + x.clone() @ self.head


class OtherLayout(MoE):
    def forward(self, x):
        return super().forward(x) + x.t().clone(memory_format=torch.contiguous_format).t()


@pytest.mark.parametrize(
    "make", [Returned, ReturnedView, Stored, HandedOn, BeforeAProduct, OtherLayout], ids=lambda m: m.__name__
)
def test_a_copy_that_somebody_could_see_stays(make):
    rewrite, records = through(make, DropCopies())
    record = records["drop_copies"]
    assert record.fired == 0 and record.after["clone"] == 1 and record.reason == ""
    assert rewrite.check.passed is True


class Every(DropCopies):
    """Drops each copy, whoever sees it."""

    def apply(self, block):
        for node in list(block.graph.nodes):
            if node.target is torch.ops.aten.clone.default:
                node.replace_all_uses_with(node.args[0])
                block.graph.erase_node(node)
        return 1


def test_a_wrong_drop_would_be_caught():
    _, records = through(Returned, Every())
    assert records["drop_copies"].reason.startswith(
        "reverted: it broke the law of the graph: leaf 1 shares memory with input_0, and did not before the pass"
    )


def test_an_inexact_drop_would_be_caught(monkeypatch):
    """A view in another order is none that gives back its operand."""

    class Turns(MoE):
        def forward(self, x):
            return super().forward(x)[:, :, None].permute(0, 2, 1).expand(-1, 1, H) + 1

    monkeypatch.setattr(drop_copies, "_is_idle_view", lambda node: node.target is torch.ops.aten.unsqueeze.default)
    _, records = through(Turns, DropCopies())
    assert records["drop_copies"].fired == 0 and records["drop_copies"].reason.startswith("reverted: ")
