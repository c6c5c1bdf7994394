"""Scales behind a product of codes, as gpt-fast's linear has them: the same experts as with scales on the codes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.ops.native.library import library
from moeopt.rewrite.install import rewritten_forward
from moeopt.rewrite.slot_codes import SlotCodes
from tests.toy_moe import Block, H

NATIVE = pytest.mark.skipif(library() is None, reason="no kernel in C++ here")
ROW, ONE = (H,), ()


class After(nn.Module):
    """(x @ q) * s"""

    def __init__(self, shape=ROW, bias=False):
        super().__init__()
        self.register_buffer("q", torch.randint(-127, 128, (H, H), dtype=torch.int8))
        self.register_buffer("s", torch.rand(shape) / 300 + 1e-4)
        self.bias = nn.Parameter(torch.randn(H)) if bias else None

    def forward(self, x):
        y = F.linear(x, self.q.to(x.dtype)) * self.s
        return y if self.bias is None else y + self.bias


class First(After):
    """s * (x @ q.t()), with the product spelt as one."""

    def forward(self, x):
        return self.s[None] * torch.mm(x, self.q.float().t())


class Rounds(After):
    """Something stands between the product and its scale."""

    def forward(self, x):
        return F.linear(x, self.q.to(x.dtype)).round() * self.s


class Twice(After):
    """The product is read unscaled too."""

    def forward(self, x):
        y = F.linear(x, self.q.to(x.dtype)) / 1000
        return y * self.s + y


class OfRows(After):
    """The scale is none of the weight's: it is made of the row."""

    def forward(self, x):
        return F.linear(x, self.q.to(x.dtype)) * (x.abs().mean(-1, keepdim=True) * self.s)


def model_of(made):
    torch.manual_seed(0)
    model = Block()
    for expert in model.experts:
        for name in ("w1", "w3", "w2"):
            setattr(expert, name, made())
    return model.eval()


def bank_of(made, dtype=torch.float32):
    model, x = model_of(made).to(dtype), torch.randn(9, H).to(dtype)
    opt = moeopt.optimize(model, x, verify="fast")
    assert opt.report.rewritten and opt.certificate.passed, str(opt.report)
    return model, opt, rewritten_forward(opt.model).banks[0][0]


@NATIVE
@pytest.mark.parametrize("made", [After, First, lambda: After(ONE), lambda: After(bias=True)])
def test_they_are_read_into_the_format(made):
    model, opt, bank = bank_of(made)
    assert isinstance(bank, SlotCodes)
    assert "weights in int8 (int8, one float32 scale per channel), read where" in opt.report.blocks[0].lowering
    first = model.experts[0].w1
    assert torch.equal(bank.w_in(0)[0], first.q.float() * first.s.expand(H)[:, None])
    with torch.no_grad():
        for one in model.buffers():  # codes and scales that are written to are read anew
            one.copy_(one.flip(0) if one.dim() else one * 2)
        x = torch.randn(40, H)
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


@NATIVE
@pytest.mark.parametrize("made", [Rounds, Twice, OfRows])
def test_what_is_no_scale_of_a_product_stays_a_function_of_a_row(made, monkeypatch):
    monkeypatch.setattr("moeopt.pipeline.block.check_pays", lambda found: None)
    assert not isinstance(bank_of(made)[2], SlotCodes)


@NATIVE
def test_sums_that_16_bits_round_stay_where_they_are(monkeypatch):
    monkeypatch.setattr("moeopt.pipeline.block.check_pays", lambda found: None)
    assert not isinstance(bank_of(After, torch.bfloat16)[2], SlotCodes)
