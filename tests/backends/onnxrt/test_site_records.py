"""Experts' weights come back bit for bit out of what each lowering made of them, or not at all."""

import pytest
import torch

pytest.importorskip("onnxruntime")

from moeopt.backends.onnxrt.lowerings import LOWERINGS
from moeopt.backends.onnxrt.site_records import blank_site, describe, emit, read_back, tensor_of
from moeopt.errors import BundleError, Declined
from moeopt.ir.specs import RouterSpec
from tests.backends.onnxrt.lowerings.one_site import make_site

pytestmark = pytest.mark.one_isa  # what a graph says of its experts

FORMS = [
    {},
    {"rows": "separate"},
    {"rows": "interleaved_up", "w_in_layout": "io"},
    {"rows": "up|gate", "w_out_layout": "io", "up_offset": 1.0, "out_norm_eps": 1e-6},
    {"rows": "plain", "activation": "relu"},
]
ROUTER = RouterSpec("softmax_topk", 2, 5, True)


def saved_by(site, lowering):
    written = {v.name: v.const_value for v in emit(site, lowering).initializers}
    return lambda name: tensor_of(written[name]) if name in written else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lowering", LOWERINGS, ids=lambda low: low.name)
def test_read_back(lowering, form, dtype):
    site = make_site(**form, dtype=dtype, router=ROUTER)
    if reason := lowering.refuses(site, "cpu"):
        pytest.skip(reason)
    again = read_back(describe(site, lowering.name, ""), lowering, saved_by(site, lowering))
    assert (again.spec, again.dtype, again.top_k, again.router) == (site.spec, site.dtype, site.top_k, site.router)
    for e in range(site.bank.num_experts):
        for read in ("w_in", "b_in", "w_out", "b_out", "norm"):
            got, want = getattr(again.bank, read)(e), getattr(site.bank, read)(e)
            for one, two in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
                assert (one is None) == (two is None) and (one is None or torch.equal(one, two)), (read, e)


class Halves:
    """A lowering that does not keep the weights as they are."""

    name = "halves"

    def emit(self, graph, site, x, ids, weights):
        w = site.bank.w_out(0)
        return graph.op("MatMul", [x, graph.weight("w", lambda: site.bank.w_out(0) / 2, w.dtype, w.shape)])


class First(Halves):
    name = "first"

    def emit(self, graph, site, x, ids, weights):
        w = site.bank.w_out(0)
        return graph.op("MatMul", [x, graph.weight("w", lambda: site.bank.w_out(0), w.dtype, w.shape)])


@pytest.mark.parametrize(
    ("lowering", "reason"),
    [(Halves(), "does not keep the experts' weights as they are in"), (First(), "does not hold every weight")],
    ids=["halves", "first"],
)
def test_what_cannot_be_read_back(lowering, reason):
    site = make_site()
    with pytest.raises(Declined, match=reason):
        read_back(describe(site, lowering.name, ""), lowering, saved_by(site, lowering))


def test_weights_that_the_lowering_would_not_write():
    site, lowering = make_site(bias=True), LOWERINGS[0]
    saved = saved_by(site, lowering)

    def padded_otherwise(name):
        value = saved(name)
        if name.endswith("gate_up.bias"):
            value[-1] = 1.0  # the row that pads the table
        return value

    with pytest.raises(Declined, match="unrolled would not write layers.0.mlp/gate_up.bias as it is"):
        read_back(describe(site, lowering.name, ""), lowering, padded_otherwise)
    with pytest.raises(Declined, match="the graph has no weight layers.0.mlp/"):
        read_back(describe(site, lowering.name, ""), lowering, lambda name: None)


@pytest.mark.parametrize(
    "change",
    [{"experts": -1}, {"experts": 1 << 40}, {"bank_dtype": "pickle"}, {"spec": '{"no": 1}'}, {"w_in": "abc"}],
    ids=str,
)
def test_a_record_that_no_bundle_holds(change):
    record = describe(make_site(), "unrolled", "")
    with pytest.raises(BundleError, match="a block's record lacks or mistypes a part"):
        blank_site(record | change)
