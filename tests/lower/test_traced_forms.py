"""Functions that torch.export stops at by itself, written otherwise in graphs of both backends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.lower.traced_forms import traced_form
from tests.toy_moe import seeded


class Statistics(nn.Module):
    def forward(self, x):
        rows, spread = x.flatten(0, 1), x.abs() + 0.1
        whole = (
            F.gaussian_nll_loss(x, x * 0.5, spread),
            F.gaussian_nll_loss(x, x * 0.5, spread[..., 0], reduction="sum"),
        )
        parts = F.gaussian_nll_loss(x, x.flip(1), x.abs() * 1e-6, full=True, eps=1e-3, reduction="none")
        return *whole, parts, rows.t().cov(), torch.cov(rows.t(), correction=0), rows[:, :2].t().corrcoef()


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@torch.no_grad()
def test_statistics_that_ask_for_values(tmp_path, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model = Statistics().eval()
    moeopt.optimize(model, seeded(2, 4, 6), backend=backend, verify="off").save(tmp_path / "saved")
    loaded = moeopt.load(tmp_path / "saved")
    for sizes in ((2, 4), (3, 5), (1, 2)):
        x = seeded(*sizes, 6)
        for got, want in zip(loaded(x), model(x), strict=True):
            torch.testing.assert_close(got, want)


def test_the_gradient_of_a_variance_below_the_limit_is_pytorchs():
    def slope(function):
        variance = (seeded(3, 4).abs() * 1e-6).requires_grad_()
        function(seeded(3, 4), torch.zeros(3, 4), variance, eps=1e-3).backward()
        return variance.grad

    torch.testing.assert_close(
        slope(lambda *args, **given: traced_form(F.gaussian_nll_loss, args, given)), slope(F.gaussian_nll_loss)
    )


def test_what_has_no_form_is_left():
    x = seeded(3, 4)
    assert traced_form(F.gaussian_nll_loss, (x, x, 1.0), {}) is None
    assert traced_form(torch.cov, (x,), {"aweights": x[0].abs()}) is None
    assert traced_form(torch.corrcoef, (x[0],), {}) is None
