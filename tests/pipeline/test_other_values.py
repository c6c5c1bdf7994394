"""A module that the model calls with several plain values is rewritten for one of them, and the report says so."""

import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from tests.zoo.dispatches import D, N, ffn


class OfTasks(nn.Module):
    """A gate for each task over the same experts; Python names the task."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(D, N) for _ in range(2))
        self.experts = nn.ModuleList(ffn() for _ in range(N))

    def forward(self, x, task=0):
        rows = x.reshape(-1, D)
        weights, ids = self.gates[task](rows).softmax(-1).topk(2)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            total = total.index_add(0, row, expert(rows[row]) * weights[row, slot, None])
        return total.view(x.shape)


class AllTasks(nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.moe, self.tasks = OfTasks(), tasks

    def forward(self, x):
        return [self.moe(x, task=task) for task in self.tasks]


def test_each_call_has_an_entry_that_says_what_it_runs():
    torch.manual_seed(0)
    model, x = AllTasks((0, 1)).eval(), torch.randn(2, 6, D)
    opt = moeopt.optimize(model, x, verify="fast")
    first, other = opt.report.blocks
    assert (first.status, other.status, other.experts) == ("rewritten", "declined", N)
    assert other.reason.startswith("the model calls it with 1 here and with 0 elsewhere, and rewritten code holds for")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleModelWarning)
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)
    same = moeopt.explain(AllTasks((0, 0)).eval(), x, verify="off")
    assert [b.status for b in same.blocks] == ["rewritten", "rewritten"]


def test_an_engine_runs_all_calls_as_they_are():
    torch.manual_seed(0)
    model, x = AllTasks((0, 1)).eval(), torch.randn(2, 6, D)
    engine = moeopt.optimize(model, x, backend="onnxruntime", verify="off")
    assert [b.status for b in engine.report.blocks] == ["declined", "declined"]
    torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tasks", [(0, False), (1, True)])
def test_values_of_two_types_are_two_values(tasks):
    """As for the guard of a rewritten block: 1 and True take other ways through Python."""
    model = AllTasks(tasks).eval()
    model.moe.gates = nn.ModuleDict({str(task): nn.Linear(D, N) for task in tasks})
    model.moe.gates.__class__ = ByText
    report = moeopt.explain(model, torch.randn(2, 6, D), verify="off")
    assert [block.status for block in report.blocks] == ["rewritten", "declined"]
    assert report.blocks[1].reason.startswith(
        f"the model calls it with {tasks[1]!r} here and with {tasks[0]!r} elsewhere"
    )


class ByText(nn.ModuleDict):
    def __getitem__(self, task):
        return super().__getitem__(str(task))
