"""Functions that torch.export stops at by itself, written otherwise in graphs of both backends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.lower.traced_forms import traced_form
from tests.toy_moe import seeded


class Statistics(nn.Module):
    def forward(self, x, spread):
        rows = x.flatten(0, 1)
        whole = (
            F.gaussian_nll_loss(x, x * 0.5, spread),
            F.gaussian_nll_loss(x, x * 0.5, spread[..., 0], reduction="sum"),
        )
        parts = F.gaussian_nll_loss(x, x.flip(1), x.abs() * 1e-6, full=True, eps=1e-3, reduction="none")
        alike = rows[:, :2].t().corrcoef(), rows[:, :1].t().corrcoef()
        return *whole, parts, rows.t().cov(), torch.cov(rows.t(), correction=0), *alike


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@torch.no_grad()
def test_statistics_that_ask_for_values(tmp_path, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model = Statistics().eval()
    moeopt.optimize(model, (seeded(2, 4, 6), seeded(2, 4, 6).abs()), backend=backend, verify="off").save(
        tmp_path / "saved"
    )
    loaded = moeopt.load(tmp_path / "saved")
    for sizes in ((2, 4), (3, 5), (1, 2)):
        x = seeded(*sizes, 6)
        spread = x.abs() + 0.1
        spread[0, 1, 2] = torch.inf
        for got, want in zip(loaded(x, spread), model(x, spread), strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises((IndexError, moeopt.errors.MoeoptError), match=r"out of (range|data bounds)"):  # as PyTorch's
        loaded(x, spread.index_fill(2, torch.tensor([4]), -1.0))


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


class Forms(nn.Module):
    """Bilinear forms as experts, of rows whose number data decide."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Bilinear(6, 3, 6) for _ in range(3))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            total = total.index_add(0, row, expert(x[row], x[row, :3]) * weights[row, slot, None])
        return total


def test_bilinear_forms_of_a_block_that_stays_are_saved(tmp_path):
    """In PyTorch they would not pay, and torch.export stops at the number of rows."""
    torch.manual_seed(0)
    model = Forms().eval()
    fast = moeopt.optimize(model, seeded(9, 6), verify="off")
    assert [b.status for b in fast.report.blocks] == ["declined"]
    fast.save(tmp_path / "saved")
    loaded = moeopt.load(tmp_path / "saved")
    for rows in (1, 5):
        torch.testing.assert_close(loaded(seeded(rows, 6)), model(seeded(rows, 6)), rtol=1e-5, atol=1e-6)
