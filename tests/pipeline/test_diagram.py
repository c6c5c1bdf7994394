"""The picture of a block holds what was captured: branches, calls of a branch, what routes, what runs now."""

import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from tests.toy_moe import Block, E, H, K, optimized, seeded

EXPERT = ["mm", "silu", "mm", "mul", "mm"]


class Stacked(nn.Module):
    """All experts in one product each: nothing branches."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(E, H, H) / 4) for _ in range(2))

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        dense = torch.zeros(x.shape[0], E).scatter_(1, ids, w)
        y = torch.bmm(F.relu(torch.bmm(x.expand(E, -1, -1), self.up)), self.down)
        return (y * dense.t()[:, :, None]).sum(0)


def test_a_loop_has_a_branch_for_each_expert():
    torch.manual_seed(0)
    graph = optimized(Block(6).eval()).report.graph
    seen = graph["captured"]
    assert (graph["block"], graph["experts"], graph["top_k"]) == ("Block", 6, K)
    assert seen["branches"] == 6 and seen["branch"][: len(EXPERT)] == EXPERT and seen["branch"][-1] == "index_add"
    assert seen["calls"] == seen["router"] + seen["dispatch"] + 6 * len(seen["branch"])
    assert "gate (Linear)" in graph["rewritten"] and graph["rewritten"].count("moeopt::experts") == 1


def test_experts_that_run_together_are_one_chain():
    torch.manual_seed(0)
    seen = optimized(Stacked().eval(), seeded(8, H)).report.graph["captured"]
    assert seen["branches"] == 1 and seen["branch"].count("bmm") == 2


def test_without_a_rewritten_block_there_is_no_picture():
    assert moeopt.explain(nn.Linear(H, H).eval(), seeded(2, H)).graph is None


def test_a_block_that_cannot_be_drawn_is_named_in_a_note(monkeypatch):
    def fails(*args):
        raise KeyError("no such step")

    monkeypatch.setattr("moeopt.pipeline.report_of.block_diagram", fails)
    report = optimized(Block().eval()).report
    assert report.graph is None and report.notes == ("Block could not be drawn (KeyError: 'no such step')",)
