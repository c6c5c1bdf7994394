"""Routers whose answer is a vector of flags for each expert: intervals of a number that each token or sequence has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moeopt

H, E, STEPS = 8, 3, 900


class Denoisers(nn.Module):
    """One expert for each interval of timesteps, a timestep for each sample."""

    asks = False

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, H)) for _ in range(E))

    def numbers(self, x, step):
        return step

    def forward(self, x, step):
        at, y = self.numbers(x, step), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            first = number * STEPS // E
            mine = (at >= first) & (at < first + STEPS // E)
            if not self.asks or mine.any():
                y[mine] = expert(x[mine])
        return y


class Skipping(Denoisers):
    asks = True


class OfTokens(Skipping):
    """The number is a feature of each token."""

    def numbers(self, x, step):
        return (x[..., 0] * 0.2 + 0.5).clamp(0, 0.999) * STEPS


class Levels(nn.Module):
    """Levels of a score, in a dict of masks by name; the score weighs what the level's expert gives."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(H, 1)
        self.experts = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(H, 12), nn.ReLU(), nn.Linear(12, H)) for name in "ab"}
        )

    def forward(self, x):
        score = torch.sigmoid(self.score(x)).squeeze(-1)
        y = torch.zeros_like(x)
        for name, mask in {"a": score < 0.5, "b": score >= 0.5}.items():
            if mask.sum() > 0:
                y[mask] = self.experts[name](x[mask]) * score[mask].unsqueeze(-1)
        return y


def call(samples: int = 6, length: int = 5):
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, length, H, generator=generator), torch.arange(samples) * (STEPS / samples) + 10.0


@pytest.mark.parametrize("make", [Denoisers, OfTokens])
def test_intervals_of_a_number_are_a_routing(make) -> None:
    torch.manual_seed(0)
    model = make().eval()
    fast = moeopt.optimize(model, call(), verify="fast")
    assert [(b.status, b.experts) for b in fast.report.blocks] == [("rewritten", E)], fast.report
    for samples, length in ((6, 5), (4, 9), (1, 1), (2, 7)):  # few samples leave experts idle
        x, step = call(samples, length)
        torch.testing.assert_close(fast(x, step), model(x, step))


def test_experts_that_few_samples_skip_are_told_as_such_and_the_way_out_works() -> None:
    torch.manual_seed(0)
    (block,) = moeopt.explain(Skipping().eval(), call()).blocks
    assert block.reason.startswith("its experts are chosen for whole sequences, and its code skips those that none")
    assert "leave that if out, since products of no rows are no error" in block.reason


def test_of_an_expert_that_no_sample_reaches_the_reason_asks_for_other_inputs() -> None:
    torch.manual_seed(0)
    x, step = call(2)
    (block,) = moeopt.explain(Skipping().eval(), (x, step * 0 + 10)).blocks
    assert "into a Python number (any)" in block.reason
    assert "where that skips an expert which no row of the example inputs reaches, give example inputs" in block.reason


def test_one_number_for_each_token_weighs_what_its_flags_choose() -> None:
    torch.manual_seed(0)
    model = Levels().eval()
    fast = moeopt.optimize(model, torch.randn(3, 6, H), verify="fast")
    assert [(b.status, b.experts) for b in fast.report.blocks] == [("rewritten", 2)], fast.report
    for shape in ((1, 1), (4, 9)):
        x = torch.randn(*shape, H)
        torch.testing.assert_close(fast(x), model(x))


class Marked(nn.Module):
    """Rows near a boundary are moved first: that flag equals an expert's on numbers that are none of those between."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, H)) for _ in range(E))
        self.moved = nn.Parameter(torch.randn(H))

    def forward(self, x, t):
        masks = [t < 2, (t >= 2) & (t < 5), t >= 5]
        x = torch.where((t <= 2.5)[..., None], x + self.moved, x)
        y = torch.zeros_like(x)
        for mask, expert in zip(masks, self.experts, strict=True):
            y[mask] = expert(x[mask])
        return y


def test_a_flag_that_is_equal_by_chance_is_not_taken_for_an_expert_s() -> None:
    torch.manual_seed(0)
    t = torch.tensor([0.0, 1, 3.5, 7, 3.2, 0.5, 7, 1])
    fast = moeopt.optimize(Marked().eval(), (torch.randn(8, H), t), verify="fast")
    assert [(b.status, b.experts) for b in fast.report.blocks] == [("rewritten", E)], fast.report
