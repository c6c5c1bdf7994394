"""What code around the experts does to rows besides carrying them is seen, with whichever op it is written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.capture.tape import record
from moeopt.recognise import routing_of_experts
from moeopt.recognise.limits import magnitudes

FAR, H, E = 1e3, 8, 4
OUTPUT = {
    "a mask of large values": lambda o, h: o * (o.abs() < FAR),
    "a mask of large rows that went in": lambda o, h: o * (h.abs().amax(-1, keepdim=True) < FAR).float(),
    "a limit from relu": lambda o, h: o - F.relu(o - FAR),
    "a limit from softplus": lambda o, h: o - F.softplus(o - FAR),
    "a soft mask": lambda o, h: o * torch.sigmoid(FAR - o.abs()),
    "a quotient": lambda o, h: o / (1 + (o.abs() - FAR).clamp(min=0)),
    "a limit of norms": lambda o, h: torch.renorm(o, 2, 0, FAR),
    "rounding": lambda o, h: o + torch.floor(h.abs().amax(-1, keepdim=True) / FAR),
    "an arctangent": lambda o, h: 1e6 * torch.atan(o / 1e6),
}
HEALED = {
    "nan_to_num": lambda o, h: torch.nan_to_num(o),
    "a mask of infinite values": lambda o, h: o.masked_fill(~o.isfinite(), 0.0),
}


class Mixture(nn.Module):
    """``before(h)`` and ``after(o, h)`` stand around each expert."""

    def __init__(self, after=lambda o, h: o, before=lambda h: h):
        super().__init__()
        self.router, self.before, self.after = nn.Linear(H, E), before, after
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, H)) for _ in range(E))

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            h = self.before(x[t])
            y = y.index_add(0, t, self.after(expert(h), h) * w[t, k, None])
        return y


def optimised(**parts):
    torch.manual_seed(0)
    model = Mixture(**parts).eval()
    opt = moeopt.optimize(model, torch.randn(24, H), verify="fast")
    return model, opt, opt.report.blocks[0]


@pytest.mark.parametrize("what", [*OUTPUT, *HEALED, "rows"])
def test_what_is_done_to_far_rows_is_not_lost(what):
    after = {**OUTPUT, **HEALED}.get(what)
    parts = {"after": after} if after else {"before": lambda h: h * (h.abs() < FAR)}
    model, opt, block = optimised(**parts)
    assert "grouped" not in (block.lowering or "") or block.status != "rewritten", block.lowering
    for size in (1.0, 10 * FAR):
        x = torch.randn(20, H) * size
        with torch.no_grad():
            torch.testing.assert_close(opt(x), model(x), rtol=1e-5, atol=1e-5 * size)


def test_infinite_outputs_stay_repaired():
    model, opt, _ = optimised(after=HEALED["nan_to_num"])
    with torch.no_grad():
        model.experts[1][2].bias.fill_(torch.inf)
        got, want = opt(x := torch.randn(20, H)), model(x)
    assert want.isfinite().all() and torch.equal(got.isfinite(), want.isfinite())


def test_the_reason_says_what_and_the_way_out(monkeypatch):
    seen = []
    check = routing_of_experts.check_rows_carried

    def told(*args):
        try:
            check(*args)
        except moeopt.errors.MoeoptError as err:
            seen.append(str(err))
            raise

    monkeypatch.setattr(routing_of_experts, "check_rows_carried", told)
    optimised(after=OUTPUT["a limit of norms"])
    assert "renorm" in seen[0] and "to rows 10000 times as large something else" in seen[0]
    assert "do it to the tokens before they are dispatched, to the block's result" in seen[0]


def test_scales_of_rows_are_carried():
    _, _, block = optimised(after=lambda o, h: (o * 2).clone())
    assert block.status == "rewritten", block.reason


class Picks(nn.Module):
    """Rows picked by their places, one of them twice as large, and a column of a number beside each."""

    def forward(self, x):
        rows = torch.stack([x[17], x[11:40:13][1] * 50.0])
        return torch.cat(
            [F.pad(rows, (12, 0), value=300), rows.scatter(1, torch.zeros(2, 1, dtype=torch.long), 400)], -1
        )


def test_places_are_no_sizes_of_values():
    """Rows go through the code once for each such number: a loop over tokens has the place of each."""
    tape = record(Picks(), (torch.randn(48, H),), {})
    assert magnitudes(tape, tape.nodes) == [50.0, 300.0, 400.0]
