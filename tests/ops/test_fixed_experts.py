"""Experts of a bundle: made ready once, and the op in everything else."""

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts_reference, quantized_experts
from moeopt.ops.experts import flatten
from moeopt.ops.fixed_experts import FixedExperts, FixedQuantizedExperts
from moeopt.ops.native import again
from moeopt.ops.native.library import library
from tests.ops.cases import make
from tests.ops.test_quantized_experts import INT8_CHANNEL, SPEC, made

SPECS = (
    ExpertsSpec(rows="separate"), ExpertsSpec(rows="plain", activation="gelu"), ExpertsSpec(out_norm_eps=1e-6),
    ExpertsSpec(rows="interleaved", w_in_layout="io", combine="slot", weight_on="input"),
)  # fmt: skip


def fixed(case):
    return FixedExperts(flatten(case.bank, case.spec), case.spec.text)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("stacked", (True, False))
@pytest.mark.parametrize("T", (0, 1, 7))
def test_it_is_the_op(spec, stacked, T):
    case = make(spec, T=T, stacked=stacked, strange_ids=True, dtype=torch.float32)
    ready = fixed(case)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ready(*case.args[:3]), experts_reference(*case.args), atol=1e-5, rtol=1e-5)
        case.ids.random_(0, 4)
        torch.testing.assert_close(ready(*case.args[:3]), experts_reference(*case.args), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stacked", (True, False))
def test_the_second_call_prepares_nothing(stacked, monkeypatch):
    if library() is None:
        pytest.skip("no native kernel here")
    case = make(SPECS[0], stacked=stacked, dtype=torch.float32)
    ready = fixed(case)
    with torch.no_grad():
        want = ready(*case.args[:3])
        monkeypatch.setattr(again, "prepared_call", lambda *args: pytest.fail("prepared anew"))
        assert torch.equal(ready(*case.args[:3]), want)


@pytest.mark.parametrize("stacked", (True, False))
def test_a_weight_that_was_moved_is_followed(stacked):
    case = make(SPECS[0], stacked=stacked, dtype=torch.float32)
    ready = fixed(case)
    with torch.no_grad():
        ready(*case.args[:3])
        weight = case.bank.w_out_s if stacked else case.bank.w_out_l[1]
        weight.data = torch._neg_view(weight.detach())
        torch.testing.assert_close(ready(*case.args[:3]), experts_reference(*case.args), atol=1e-5, rtol=1e-5)
        weight.data = torch.randn_like(weight)
        torch.testing.assert_close(ready(*case.args[:3]), experts_reference(*case.args), atol=1e-5, rtol=1e-5)


def test_tracers_and_gradients_see_the_op():
    case = make(SPECS[0], dtype=torch.float32)
    ready = fixed(case)
    graph = torch.fx.experimental.proxy_tensor.make_fx(ready)(*case.args[:3])
    assert any(node.target is torch.ops.moeopt.experts.default for node in graph.graph.nodes)
    x = case.x.requires_grad_()
    (got,) = torch.autograd.grad(ready(x, case.ids, case.weights).sum(), x)
    (want,) = torch.autograd.grad(experts_reference(*case.args).sum(), x)
    torch.testing.assert_close(got, want)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        ready(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), case.ids, case.weights)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_quantised_ones_are_their_op(dtype, monkeypatch):
    x, ids, weights, bank = made((INT8_CHANNEL, INT8_CHANNEL))
    x, weights = x.to(dtype), weights.to(dtype)
    lists, texts = quantized_experts.flatten(bank), (SPEC.text, bank.format.text)
    ready = FixedQuantizedExperts(lists, *texts)
    with torch.no_grad():
        for _ in range(2):
            got = ready(x, ids, weights)
            assert torch.equal(got, torch.ops.moeopt.quantized_experts(x, ids, weights, *lists, *texts))
        if library() is not None:
            monkeypatch.setattr(again, "prepared_call", lambda *args: pytest.fail("prepared anew"))
            assert torch.equal(ready(x, ids, weights), got)
