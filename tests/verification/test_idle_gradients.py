"""Experts that no token reaches train as in the original: left alone, or moved by weight decay."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import count_expert_calls
from tests.toy_moe import Block, E, H, K, build, close, optimized, seeded

ONE = seeded(1, 1, H, seed=9)


class LoopOverAll(Block):
    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class LoopOverHit(Block):
    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return y


class OutputsOfAll(Block):
    """Every expert runs on every token."""

    def loop(self, x, ids, w):
        dense = torch.zeros(len(x), E).scatter(1, ids, w)
        return torch.einsum("te,eth->th", dense, torch.stack([expert(x) for expert in self.experts]))


class Stacked(Block):
    """One Parameter holds all experts: it always has a gradient."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.w_in, self.w_out = (nn.Parameter(torch.randn(E, H, H) / 4) for _ in range(2))

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            if len(token):
                y.index_add_(0, token, F.relu(x[token] @ self.w_in[e]) @ self.w_out[e] * w[token, slot, None])
        return y


class FirstAlways(Block):
    """Mixed: the first expert runs without tokens too, the others do not."""

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if e == 0 or len(token):
                y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


def without_gradient(model):
    return {name for name, p in model.named_parameters() if p.grad is None}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("block", "idle"),
    [(Block, E - K), (LoopOverHit, E - K), (LoopOverAll, 0), (OutputsOfAll, 0), (Stacked, 0)],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_weight_decay_moves_the_same_experts(block, idle):
    original = build(block)
    model = copy.deepcopy(original)
    opt = optimized(model, inplace=True, verify="fast")
    # AdamW divides a gradient by its own size plus eps. The router's rows of idle experts have a gradient of zero plus
    # roundings (1e-9 to 1e-5 here), which the usual eps of 1e-8 would make whole steps in any direction.
    steps = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5, eps=1e-2) for m in (original, model)]
    for _ in range(2):
        for m, step in zip((original, model), steps, strict=True):
            step.zero_grad()
            with count_expert_calls() as seen:
                (m(ONE) ** 2).sum().backward()
            assert len(seen) == (m is model)  # the rewritten code is what is trained
            step.step()
        assert without_gradient(model) == without_gradient(original)
        assert len(without_gradient(model)) == 3 * idle
    for got, want in zip(opt.model.parameters(), original.parameters(), strict=True):
        assert (got - want).norm() < 1e-3 * want.norm()  # decay alone moves a tenth


def test_what_is_neither_runs_its_original_code_where_it_is_trained():
    original = build(FirstAlways)
    opt = optimized(copy.deepcopy(original), verify="fast")
    x = next(x for x in (seeded(1, 1, H, seed=s) for s in range(99)) if 0 not in original.route(x[0])[0])
    with torch.no_grad(), count_expert_calls() as seen:
        opt(x)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="which of its experts have no gradient"):
        opt(x).sum().backward()
    original(x).sum().backward()
    assert without_gradient(opt.model) == without_gradient(original)


class WritesInPlace(Block):
    """In-place writes leave detaches in a trace without gradients, which nobody wrote."""

    def route(self, x):
        logits = self.gate(x)
        best, ids = logits.topk(K, -1)
        p = torch.full_like(logits, float("-inf")).scatter_(-1, ids, best).softmax(-1)
        return ids, p.gather(1, ids)

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        rows = y.view(-1, H)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(-1)
            if mine.any():
                rows[mine] += expert(x[mine]) * (w * (ids == e)).sum(-1)[mine, None]
        return y


class Detached(WritesInPlace):
    def route(self, x):
        ids, w = super().route(x)
        return ids, w.detach()


@pytest.mark.parametrize("block", [WritesInPlace, Detached])
def test_a_detach_is_kept_where_it_was_written(block):
    original = build(block)
    opt = optimized(copy.deepcopy(original), verify="fast")
    x, other = (seeded(2, 8, H).requires_grad_() for _ in range(2))
    original(x).pow(2).sum().backward()
    opt(other).pow(2).sum().backward()
    close(other.grad, x.grad, eps=64)
    assert without_gradient(opt.model) == without_gradient(original)
    for got, want in zip(opt.model.parameters(), original.parameters(), strict=True):
        if want.grad is not None:
            close(got.grad, want.grad, eps=64)


def test_in_place_writes_do_not_send_training_to_the_original_code(recwarn):
    opt = optimized(build(WritesInPlace), verify="fast")
    assert "aten.alias" in str([n.target for n in opt.model.forward.program.graph().nodes])  # what was a detach
    with count_expert_calls() as seen:
        opt(seeded(2, 8, H)).sum().backward()
    assert len(seen) == 1 and not [w for w in recwarn if "original code" in str(w.message)]
