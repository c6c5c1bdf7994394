"""A clamp that no probe reaches is kept where it stands, or its block is declined: never left out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt

FAR = 3e4
H, INNER, E = 8, 12, 4
HOW = {
    "clamp": lambda v: v.clamp(-FAR, FAR),
    "from above": lambda v: v.clamp(max=FAR),
    "hardtanh": lambda v: F.hardtanh(v, -FAR, FAR),
    "where": lambda v: torch.where(v > FAR, torch.full_like(v, FAR), v),
    "masked_fill": lambda v: v.masked_fill(v < -FAR, -FAR),
    "minimum": lambda v: torch.minimum(v, torch.tensor(FAR)),
    "softcap": lambda v: FAR * torch.tanh(v / FAR),
}


class Limited(nn.Module):
    """A mixture whose values are limited at one place."""

    def __init__(self, place, how="clamp"):
        super().__init__()
        self.place, self.how = place, how
        self.router = nn.Linear(H, E, bias=False)
        self.gate, self.up, self.down = (
            nn.ModuleList([nn.Linear(a, b, bias=False) for _ in range(E)])
            for a, b in ((H, INNER), (H, INNER), (INNER, H))
        )

    def at(self, place, value):
        return HOW[self.how](value) if place == self.place else value

    def forward(self, x):
        """``x`` (batch, tokens, H)."""
        rows = self.at("tokens", x.reshape(-1, H))
        logits = self.at("logits", self.router(rows))
        w, ids = logits.softmax(-1).topk(2, -1)
        w = self.at("weights", logits.gather(-1, ids) if self.place == "weights" else w)
        y, dispatched = torch.zeros_like(rows), self.at("dispatched", rows)
        for e in range(E):
            t, k = torch.where(ids == e)
            row = self.at("an expert's rows", dispatched[t])
            gate = F.silu(self.at("gate", self.gate[e](row)))
            inner = self.at("activation", gate) * self.at("up", self.up[e](row))
            out = self.at("output", self.down[e](self.at("product", inner)))
            y.index_add_(0, t, self.at("weighted output", out * w[t, k, None]))
        return self.at("sum", y).view_as(x)


CASES = {
    "tokens": "rewritten",
    "logits": "rewritten",
    "weights": "rewritten",
    "dispatched": "rewritten",
    "an expert's rows": "between the tokens and the sum",
    "gate": "rewritten",
    "activation": "rewritten",
    "up": "rewritten",
    "product": "a gated pair of matmuls with clamp, a function of a row that no grouped kernel has",
    "output": "between the tokens and the sum",
    "weighted output": "between the tokens and the sum",
    "sum": "rewritten",
}
MORE = [(place, how) for how in HOW if how != "clamp" for place in ("dispatched", "gate", "output")]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("place", "how"), [*((place, "clamp") for place in CASES), *MORE])
def test_a_far_limit_holds(place, how):
    torch.manual_seed(0)
    model = Limited(place, how).eval()
    optimised = moeopt.optimize(model, torch.randn(3, 5, H), verify="fast")
    (block,) = optimised.report.blocks
    if how == "clamp" or place == "output":
        want = CASES[place]
        assert block.status == "rewritten" if want == "rewritten" else want in block.reason, block.reason
    for size in (1, FAR / 3, 3 * FAR, 30 * FAR):
        x = torch.randn(4, 5, H) * size
        with torch.no_grad():
            want, got = model(x), optimised(x)
        assert (want - got).norm() <= 1e-5 * want.norm(), f"rows of {size:g}: {block.status} {block.reason}"


def test_the_reason_names_the_limit_and_the_way_out():
    torch.manual_seed(0)
    optimised = moeopt.optimize(Limited("output").eval(), torch.randn(3, 5, H), verify="off")
    (block,) = optimised.report.blocks
    assert block.reason.startswith("its forward limits values with clamp (-30000, 30000) between the tokens and")
    assert "limit the tokens before they are dispatched, the block's result, or" in block.reason


class Anew(Limited):
    """Every expert computes the limited tokens, and the router's capped logits, once more."""

    def forward(self, x):
        y = torch.zeros_like(x)
        for e in range(E):
            rows = x.clamp(-FAR, FAR)
            w, ids = (5 * torch.tanh(self.router(rows) / 5)).softmax(-1).topk(2, -1)
            t, k = torch.where(ids == e)
            y.index_add_(0, t, self.down[e](F.silu(self.gate[e](rows[t]))) * w[t, k, None])
        return y


def test_limits_that_are_computed_anew_for_each_expert():
    torch.manual_seed(0)
    model = Anew("nowhere").eval()
    optimised = moeopt.optimize(model, torch.randn(15, H), verify="fast")
    assert [b.status for b in optimised.report.blocks] == ["rewritten"], optimised.report.blocks[0].reason
    x = torch.randn(20, H) * 3 * FAR
    with torch.no_grad():
        torch.testing.assert_close(optimised(x), model(x), rtol=1e-4, atol=1.0)


class Scattered(Limited):
    """Capped logits, and weights in a table that is made like these: of their sizes, and of none of their values."""

    def forward(self, x):
        logits = 30 * torch.tanh(self.router(x) / 30)
        w, ids = logits.topk(2, -1)
        table = {
            "zeros_like": torch.zeros_like, "new_zeros": lambda v: v.new_zeros(v.shape),
            "full_like": lambda v: torch.full_like(v, 0.0),
        }[self.place](logits).scatter(-1, ids, w.softmax(-1))  # fmt: skip
        return sum(self.down[e](F.silu(self.gate[e](x))) * table[:, e : e + 1] for e in range(E))


@pytest.mark.sample(3)
@pytest.mark.parametrize("made", ["zeros_like", "new_zeros", "full_like"])
def test_a_limit_whose_sizes_alone_are_read_is_the_routers(made):
    torch.manual_seed(0)
    model = Scattered(made).eval()
    optimised = moeopt.optimize(model, torch.randn(15, H), verify="fast")
    assert [b.status for b in optimised.report.blocks] == ["rewritten"], optimised.report.blocks[0].reason
    x = torch.randn(20, H) * 100
    with torch.no_grad():
        torch.testing.assert_close(optimised(x), model(x), rtol=1e-4, atol=1e-3)
