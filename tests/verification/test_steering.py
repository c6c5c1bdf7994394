"""Rows that take a router's logits where they are asked to."""

import torch
from torch import nn

from moeopt.verification.steering import LEVELS, ORDINARY, steered_rows

H, E = 16, 6


class Block(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(H) if norm else nn.Identity()
        self.gate, self.shared = nn.Linear(H, E, bias=False), nn.Linear(H, 1, bias=False)

    def logits(self, x):
        return self.gate(self.norm(x))

    def forward(self, x):
        return self.logits(x), self.shared(x)


def steered(norm: bool = False, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    block = Block(norm).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return block, steered_rows(torch.randn(ORDINARY, H, generator=generator).to(dtype), block, E, generator)


def rows_of(rows, kind):
    return rows.values[[k == kind for k in rows.kinds]]


def test_all_logits_of_a_plain_router_lie_near_a_level():
    block, (rows, *_) = steered()
    with torch.no_grad():
        usual = block.logits(rows_of(rows, "an ordinary row")).abs().max()
        for level in LEVELS:
            logits = block.logits(rows_of(rows, f"a row with all of its router's logits near {level}"))
            assert logits.shape == (2, E) and (logits - level).abs().max() < usual + 0.1
        equal = block.logits(rows_of(rows, "a row with all of its router's logits equal"))
        assert (equal.amax(-1) - equal.amin(-1)).max() < 1e-4 < equal.abs().min()
        gate = block.shared(rows_of(rows, "a row with all of a gate's logits near -20"))
        assert (gate + 20).abs().max() < 5


def test_behind_a_norm_they_go_as_far_as_it_lets_them():
    block, (rows, *_) = steered(norm=True)
    with torch.no_grad():
        down = block.logits(rows_of(rows, "a row that steers all of its router's logits down")).mean(-1)
        up = block.logits(rows_of(rows, "a row that steers all of its router's logits up")).mean(-1)
        usual = block.logits(rows_of(rows, "an ordinary row")).mean(-1)
    assert down.min() < usual.min() and usual.max() < up.max()


def test_zero_tiny_huge_and_broken_rows_stay_in_the_range_of_their_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, (_, sized, broken) = steered(dtype=dtype)
        assert sized.values.dtype == dtype and sized.values.isfinite().all()
        zeros = sized.values.eq(0).all(-1)
        assert [k for k, zero in zip(sized.kinds, zeros.tolist(), strict=True) if zero] == ["a row of zeros"] * 3
        assert {"a row 10^-2 times the ordinary", "a row 10^1 times the ordinary"} <= set(sized.kinds)
        assert broken.values.isnan().all(-1).tolist() == [k == "a row of NaN" for k in broken.kinds]


def test_a_router_that_is_no_product_is_steered_along_a_fit_of_its_scores():
    torch.manual_seed(0)
    weight, generator = torch.randn(E, H), torch.Generator().manual_seed(0)

    def run(x):
        return [(x[:, None] * weight).sum(-1).sigmoid()]

    rows, *_ = steered_rows(torch.randn(ORDINARY, H, generator=generator), run, E, generator)
    down, up = (rows_of(rows, f"a row that steers its router's scores {way}") for way in ("down", "up"))
    assert len(down) == len(up) == 5
    assert run(down[-1:])[0].mean() < run(rows_of(rows, "an ordinary row"))[0].mean() < run(up[-1:])[0].mean()
