"""A lowering is priced by what the lowering itself says, and by no name; one without a price stops the choice."""

import pytest

from moeopt.backends.onnxrt import lowerings as ort_lowerings
from moeopt.backends.onnxrt import select
from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.tensorrt import lowerings as trt_lowerings
from moeopt.backends.tensorrt import plan as trt_plan
from moeopt.backends.tensorrt.target import parse_target
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.dense import Dense
from tests.backends.onnxrt.lowerings.one_site import make_site


class Toy(Dense):
    """Dense under a name that nothing knows; ``flops`` is what a token costs."""

    name = "toy"

    def __init__(self, flops):
        self.flops = flops

    def cost(self, site, tokens, provider):
        return Cost(moved=0.0, flops=self.flops * tokens, kernels=1)


class Unpriced:
    name = "unpriced"

    def refuses(self, site, provider):
        return ""


def test_onnxruntime_prices_an_unknown_lowering_by_its_own_cost(monkeypatch):
    site, prices = make_site(), {}
    for flops in (1.0, 1e12):
        monkeypatch.setattr(select, "LOWERINGS", (*ort_lowerings.LOWERINGS, Toy(flops)))
        ranking = select.ranked(site, "cpu", (1, 16))
        prices[flops] = next(c.seconds for c in ranking if c.name == "toy")
        assert (ranking[0].name == "toy") == (flops == 1.0)
    assert prices[1e12] == pytest.approx(17e12 / select.CPU.gemm, rel=1e-3)


def test_tensorrt_prices_an_unknown_form_by_its_own_cost(monkeypatch):
    site = make_site()
    for flops in (1.0, 1e15):
        monkeypatch.setattr(trt_plan, "FORMS", (*trt_lowerings.FORMS, Toy(flops)))
        plan = trt_plan.TensorRTPlan(parse_target("sm_89"), (1, 16), open_session=session_of)
        fit = [c.name for c in plan.rank(site) if c.lowering]
        assert fit[0 if flops == 1.0 else -1] == "toy"


def test_a_lowering_without_a_cost_is_never_priced_as_another(monkeypatch):
    monkeypatch.setattr(select, "LOWERINGS", (*ort_lowerings.LOWERINGS, Unpriced()))
    with pytest.raises(AttributeError, match="'Unpriced' object has no attribute 'cost'"):
        select.ranked(make_site(), "cpu")


@pytest.mark.parametrize("lowering", [*ort_lowerings.LOWERINGS, *trt_lowerings.FORMS], ids=lambda low: low.name)
def test_every_cost_grows_with_the_tokens(lowering):
    site = make_site(E=64)
    few, many = (lowering.cost(site, tokens, "cpu") for tokens in (1, 2048))
    assert 0 < few.moved <= many.moved and 0 < few.flops < many.flops and few.kernels <= many.kernels
