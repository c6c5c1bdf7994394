"""Experts that read a row of several tensors for each token: joined before the op, which hands each expert one row."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from tests.zoo import scales_and_sharing

D, C, N = 16, 5, 4


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.scale, self.down = nn.Linear(D, 24), nn.Linear(C, 24), nn.Linear(24, D)

    def forward(self, rows, condition):
        return self.down(F.silu(self.up(rows)) * (1 + self.scale(condition)))


class ByTime(nn.Module):
    """A condition for each sequence (of a diffusion model: its time step), repeated for its tokens."""

    def __init__(self, carry=lambda condition, at: condition[at]):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(D, N), nn.ModuleList(Conditioned() for _ in range(N))
        self.carry = carry

    def forward(self, x, time):
        rows, condition = x.reshape(-1, D), time.unsqueeze(1).expand(-1, x.shape[1], -1).reshape(-1, C)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at, slot = torch.where(ids == number)
            if len(at):
                total.index_add_(0, at, expert(rows[at], self.carry(condition, at)) * weights[at, slot, None])
        return total.view_as(x)


class SharedBase(nn.Module):
    """MixLoRA: one FFN whose products are computed once for all tokens, and low-rank updates for each expert."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(D, N), nn.Linear(D, 24), nn.Linear(24, D)
        self.updates = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(i, 3, bias=False), nn.Linear(3, o, bias=False)) for i, o in ends)
            for ends in [((D, 24), (24, D))] * N
        )

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        base, total = self.up(rows), torch.zeros_like(rows)
        for number, (first, second) in enumerate(self.updates):
            at, slot = torch.where(ids == number)
            if len(at):
                inner = F.gelu(base[at] + first(rows[at]))
                total.index_add_(0, at, (self.down(inner) + second(inner)) * weights[at, slot, None])
        return total.view_as(x)


def calls(*shapes):
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(b, t, D, generator=rng), torch.randn(b, C, generator=rng)) for b, t in shapes]


@pytest.mark.parametrize(
    "carry", [None, lambda condition, at: condition.clamp(-3, 3)[at], lambda condition, at: condition[at].clamp(-3, 3)]
)
def test_a_condition_beside_each_token_in_an_engine(carry):
    model = (ByTime() if carry is None else ByTime(carry)).eval()
    first, *others = calls((2, 9), (3, 5), (1, 1))
    engine = moeopt.optimize(model, first, backend="onnxruntime")
    (block,) = engine.report.rewritten
    assert block.experts == N and engine.certificate.passed is True
    for call in (first, *others, tuple(t * 50 for t in others[0])):
        with torch.no_grad():
            torch.testing.assert_close(engine(*call), model(*call), rtol=1e-5, atol=1e-5 * float(call[0].abs().max()))


def test_products_that_all_experts_share_in_an_engine():
    model = SharedBase().eval()
    (first, _), *others = calls((2, 9), (3, 5), (1, 1))
    engine = moeopt.optimize(model, first, backend="onnxruntime")
    (block,) = engine.report.rewritten
    assert block.experts == N
    for x in (first, *(x for x, _ in others)):
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


def test_pytorch_is_told_what_they_are():
    (block,) = [b for b in moeopt.explain(ByTime().eval(), calls((2, 9))[0]).blocks if b.kind == "moe"]
    assert block.status == "declined" and "a gated pair of matmuls with rows of 2 tensors, a function" in block.reason


def test_rows_of_other_tokens_are_no_row_of_the_token():
    model = ByTime(lambda condition, at: condition[at.flip(0)]).eval()
    call = tuple(t[:1].repeat(2, 1, 1) if t.dim() == 3 else t for t in calls((2, 9))[0])
    (block,) = [b for b in moeopt.explain(model, call).blocks if b.kind == "moe"]
    assert block.status == "declined" and "which are not rows of the same tokens" in block.reason


def test_rows_that_are_picked_twice_beside_others():
    """Of one tensor the same rows by two calls, and of two others: all of them are rows of one token."""
    torch.manual_seed(0)
    model = scales_and_sharing.adapters_on_picked_rows().eval()
    (block,) = [b for b in moeopt.explain(model, torch.randn(2, 9, scales_and_sharing.D)).blocks if b.kind == "moe"]
    assert (block.status, block.experts) == ("rewritten", 4)
