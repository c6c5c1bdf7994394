"""Experts get codes; each twin has experts that cannot; damaged codes are found by the block's own verification."""

import pytest
import torch

from moeopt.ir.weight_format import FORMATS
from moeopt.options import QuantPlan
from moeopt.passes.base import Level
from moeopt.passes.pipeline import PIPELINE
from moeopt.passes.quantize_experts import QuantizeExperts
from moeopt.rewrite import live_codes
from moeopt.rewrite.install import RewrittenForward
from moeopt.rewrite.live_codes import LiveCodes, dequantized
from moeopt.rewrite.spare_floats import SpareFloats
from tests.recognise.tiny import GLU, H, MoE, ffn, seeded, through

ALL = {name: QuantPlan(default=name) for name in ("int8", "int4", "fp8", "mxfp4")}


def test_it_is_the_last_pass_and_off():
    assert PIPELINE[-1].name == "quantize_experts" and PIPELINE[-1].level is Level.LOSSY
    assert not PIPELINE[-1].asked


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", [MoE, lambda: MoE(GLU), lambda: MoE(lambda: ffn(inner=37))], ids=["ffn", "glu", "37"])
def test_fires_and_is_verified_on_the_rounded_floats(make, name):
    rewrite, records = through(make, QuantizeExperts(ALL[name]))
    record, block = records["quantize_experts"], rewrite.program.block
    assert (record.fired, record.verified, record.level) == (1, True, Level.LOSSY)
    assert block.formats == {0: FORMATS[name]}
    assert rewrite.check.passed is True and rewrite.check.distance_rewritten < 1e-5


def test_the_judge_is_the_block_itself_on_the_rounded_floats():
    module = seeded(lambda: MoE(GLU))
    rewrite, _ = through(lambda: MoE(GLU), QuantizeExperts(ALL["int8"]))
    forward = RewrittenForward(module, rewrite.program)
    x = torch.randn(9, H)
    (codes,) = (bank for bank, _ in forward.banks)
    before = module.experts[0].down.weight
    with torch.no_grad(), dequantized(module, [codes]):
        assert torch.equal(module.experts[1].gate.weight, codes.w_in(1)[0])
        want = module(x)
    assert module.experts[0].down.weight is before
    torch.testing.assert_close(forward(x), want, rtol=1e-5, atol=1e-6)  # float32 sums in another order
    assert not torch.allclose(module(x), want, rtol=1e-4, atol=1e-5)  # and the floats are others


def test_blocks_that_run_one_after_another_have_the_floats_in_the_same_memory():
    spare, rewrite = SpareFloats(), through(lambda: MoE(GLU), QuantizeExperts(ALL["int4"]))[0]
    x, seen = torch.randn(9, H), []
    for seed in (0, 1):
        module = seeded(lambda: MoE(GLU), seed)
        codes = [bank for bank, _ in RewrittenForward(module, rewrite.program).banks]
        down = module.experts[0].down
        with torch.no_grad(), dequantized(module, codes):
            want = module(x)
        with torch.no_grad(), dequantized(module, codes, spare):
            assert torch.equal(module(x), want)
            seen.append(down.weight.data_ptr())
            with dequantized(module, codes, spare):  # what is in use is nobody else's
                assert down.weight.data_ptr() != seen[-1] and torch.equal(module(x), want)
    with torch.no_grad(), dequantized(module, codes, spare):
        assert down.weight.data_ptr() in seen


def test_a_block_that_the_plan_leaves_alone():
    rewrite, records = through(MoE, QuantizeExperts(QuantPlan({"other": "int8"})))
    assert records["quantize_experts"].fired == 0 and not rewrite.program.block.formats


def test_without_a_plan_it_says_what_to_give():
    _, records = through(MoE, QuantizeExperts())
    assert records["quantize_experts"].reason.startswith("no format was asked for: give quantize='int8'")


class Broken(MoE):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.experts[2][0].weight[0, 0] = 1e37


def test_weights_that_have_no_code():
    rewrite, records = through(Broken, QuantizeExperts(ALL["int8"]))
    reason = records["quantize_experts"].reason
    assert reason.startswith("expert 2 has weights that are NaN, infinite or beyond 1e+36"), reason
    assert not rewrite.program.block.formats


def swapped(bank, names):
    a = bank.held[names[0]]
    a[[0, 1]] = a[[1, 0]]


def flipped(bank, names):
    bank.held[names[0]].neg_()


def scaled(bank, names):
    bank.held[names[1]][0, 0] *= 1.01


@pytest.mark.parametrize("damage", [swapped, flipped, scaled])
def test_damaged_codes_are_found(monkeypatch, damage):
    """The kernel reads other codes than those that were rounded: the block is not the quantised model."""
    whole = live_codes.LiveCodes.fill

    def fill(self, module):
        whole(self, module)  # the judge has the right floats; what runs is damaged after them
        if not getattr(self, "damaged", False):
            damage(self, self.names)
            self.damaged = True

    monkeypatch.setattr(LiveCodes, "fill", fill)
    rewrite, records = through(lambda: MoE(GLU), QuantizeExperts(ALL["int8"]))
    assert records["quantize_experts"].reason.startswith("reverted: the block is not equivalent with it")
    assert not rewrite.program.block.formats
