"""A probe call that shows too little is made larger, and is not made again as it was."""

import pytest
import torch
from torch import nn

import moeopt
import moeopt.pipeline.block_capture as block_capture
from moeopt.capture.probe_inputs import call_specs
from moeopt.errors import Declined
from moeopt.options import Options
from moeopt.pipeline.block_capture import Capture
from moeopt.pipeline.coverage import Mixture


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(4))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            y.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return y


@pytest.mark.parametrize("aimed", [True, False])
def test_each_call_differs_from_those_before(monkeypatch, aimed):
    torch.manual_seed(0)
    module = Moe().eval()
    (spec,) = list(call_specs((torch.randn(12, 8),), {}))[:1]
    made = []
    probe = block_capture.probe_call
    if not aimed:
        monkeypatch.setattr(block_capture, "aimed_at_router", lambda module, call_spec: None)

    def noted(*args, **kwargs):
        made.append(probe(*args, **kwargs))
        return made[-1]

    class Unread(Mixture):
        def again(self, tape, known):
            raise Declined("too few tokens")

    monkeypatch.setattr(block_capture, "probe_call", noted)
    with pytest.raises(Declined, match="too few tokens"):
        Capture("moe", module, spec, Options(), Unread())
    calls = [args[0] for args, _ in made]
    assert len(calls) == 2
    assert calls[0].shape != calls[1].shape or not torch.equal(*calls)


class Skipping(nn.Module):
    """Rows that the router is not sure of pass by all experts: of few tokens it may be none."""

    def __init__(self, features, least):
        super().__init__()
        self.gate, self.least = nn.Linear(features, 4), least
        wide = features * 3 // 2
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(features, wide), nn.GELU(), nn.Linear(wide, features)) for _ in range(4)
        )

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(1)
        keep = weights[:, 0] > self.least
        rows, y = x[keep], x.clone()
        weights, ids, total = weights[keep], ids[keep], torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            total.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        y[keep] = y[keep] + total
        return y


@pytest.mark.parametrize(
    ("seed", "features", "least"),
    [(2, 16, 0.3), (5, 8, 0.27)],
    ids=["no probe leaves a row out", "some probes leave no row out"],
)
def test_rows_that_few_probes_leave_out_are_shown_by_more_tokens(seed, features, least):
    """Where none is left out, the rows that were kept are all rows: a rewrite hung on the numbers of a router."""
    torch.manual_seed(seed)
    module = Skipping(features, least).eval()
    (block,) = moeopt.explain(module, torch.randn(12, features), verify="fast").blocks
    assert block.status == "rewritten", block.reason
