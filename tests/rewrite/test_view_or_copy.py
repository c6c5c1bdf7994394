"""A reshape that copies some inputs and is a view of others is one step, in images above all."""

import pytest
import torch
from torch import nn

from moeopt.rewrite.kept_steps import KeptSteps, StepRef
from moeopt.rewrite.view_or_copy import without_copies_of_some
from tests.toy_moe import close, optimized, seeded

aten = torch.ops.aten
C = 12


class Image(nn.Module):
    """Each pixel of (B, C, H, W) chooses two of four experts; ``flat`` makes rows of pixels."""

    def __init__(self, flat):
        super().__init__()
        self.flat, self.gate = flat, nn.Conv2d(C, 4, 1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(C, 20), nn.GELU(), nn.Linear(20, C)) for _ in range(4))

    def forward(self, x):
        rows, scores = self.flat(x), self.flat(self.gate(x)).softmax(-1)
        weights, ids = scores.topk(2, -1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.reshape(x.shape[0], *x.shape[2:], C).permute(0, 3, 1, 2)


def by_reshape(x):
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def by_contiguous(x):
    return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])


def by_flatten(x):
    return x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])


@pytest.mark.parametrize("flat", (by_reshape, by_contiguous, by_flatten))
def test_experts_for_pixels_are_rewritten(flat):
    torch.manual_seed(0)
    model = Image(flat).eval()
    fast = optimized(model, seeded(2, C, 4, 5))
    assert fast.report.blocks[0].status == "rewritten", fast.report.blocks[0].reason
    last = seeded(3, C, 4, 4).to(memory_format=torch.channels_last)
    for x in (seeded(1, C, 1, 1), seeded(3, C, 1, 7), seeded(1, C, 6, 2), last, seeded(2, 2 * C, 3, 3)[:, ::2]):
        close(fast(x), model(x))
    assert not fast.model.forward.fallbacks


def steps(copied, *, read_twice=False, kind=torch.contiguous_format):
    """x turned and reshaped, with a copy between where it is ``copied``; then doubled."""
    plan = KeptSteps([], None, [], {}, [])
    turned = plan.call(aten.permute.default, StepRef(0), [1, 0])
    rows = plan.call(aten.clone.default, turned, memory_format=kind) if copied else turned
    flat = plan.call(aten.reshape.default, rows, [-1])
    plan.output = plan.call(aten.mul.Tensor, flat, 2)
    plan.attributes[("", "seen")] = rows if read_twice else plan.output
    return plan


def test_a_copy_that_some_calls_make_is_left_out_and_the_rest_numbered_anew():
    plain = steps(False)
    for plans in ([plain, steps(True)], [steps(True), plain, steps(True)]):
        for plan in without_copies_of_some(plans):
            assert (plan.steps, plan.output, plan.attributes) == (plain.steps, plain.output, plain.attributes)


@pytest.mark.parametrize(
    "other",
    (steps(True), steps(False, read_twice=True)),
    ids=("every call makes it", "something else reads it"),
)
def test_a_copy_of_the_author_s_own_stays(other):
    first = steps(True, read_twice=len(other.steps) == 3)
    assert [len(plan.steps) for plan in without_copies_of_some([first, other])] == [4, len(other.steps)]


def test_a_copy_that_keeps_the_order_in_memory_stays():
    plans = without_copies_of_some([steps(True, kind=torch.preserve_format), steps(False)])
    assert [len(plan.steps) for plan in plans] == [4, 3]
