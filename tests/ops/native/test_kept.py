"""What the kernel keeps of W_in's products for a backward pass."""

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights
from moeopt.ops.native import dispatch
from moeopt.ops.native.dispatch import experts_on_cpu
from moeopt.ops.native.hidden import Hidden
from moeopt.ops.native.library import library
from tests.ops.cases import make


@pytest.fixture(autouse=True)
def native(monkeypatch):
    if library() is None:
        pytest.skip("no native kernel here")
    monkeypatch.setattr(dispatch, "_is_faster", lambda *args: True)


ROWS = ("gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("layout", ("oi", "io"))
def test_the_kernel_keeps_gates_and_ups(rows, dtype, layout):
    spec = ExpertsSpec(rows=rows, w_in_layout=layout, gate_max=0.5, up_min=-0.1)  # kept as they are before the clamps
    case = make(spec, T=9, E=4, dtype=dtype, strange_ids=True, stacked=rows != "plain")
    hidden = Hidden()
    with torch.no_grad():
        y = experts_on_cpu(*case.args, hidden)
        assert torch.equal(y, experts_on_cpu(*case.args))
    pairs = [(e, t) for e in range(4) for t, row in enumerate(case.ids.tolist()) for id in row if id == e]
    for (e, t), got in zip(pairs, hidden.rows, strict=False):
        right = []
        for w, b in zip(case.bank.w_in(e), case.bank.b_in(e), strict=True):
            w = w.double() if layout == "oi" else w.double().t()
            right.append(w @ case.x[t].double() + b.double())
        h = torch.cat(right)
        if rows in ("up|gate", "interleaved", "interleaved_up"):
            n = len(h) // 2
            h = torch.cat({
                "up|gate": (h[n:], h[:n]), "interleaved": (h[0::2], h[1::2]), "interleaved_up": (h[1::2], h[0::2]),
            }[rows])  # fmt: skip
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), h, rtol=0, atol=8 * torch.finfo(dtype).eps * h.abs().max().item())


@pytest.mark.parametrize("stacked", (True, False))
def test_a_call_that_is_done_again_keeps_its_own(stacked):
    case = make(ExpertsSpec(), stacked=stacked, dtype=torch.float32)
    known = {}
    case.bank.remembered = lambda rows: (known, [])
    first, second = Hidden(), Hidden()
    with torch.no_grad():
        experts_on_cpu(*case.args, first)
        before = first.rows.clone()
        assert known
        case.x.neg_()
        y = experts_on_cpu(*case.args, second)
        assert torch.equal(y, experts_on_cpu(*case.args))  # which keeps nothing, and writes nowhere
    assert torch.equal(first.rows, before) and not torch.equal(first.rows, second.rows)


def test_nothing_is_kept_of_experts_of_several_widths():
    wide, narrow = torch.randn(8, 6), torch.randn(4, 6)
    bank = ListExpertWeights([[wide, narrow]], [torch.randn(6, 8), torch.randn(6, 4)])
    hidden = Hidden()
    ids = torch.tensor([[0], [1], [0]])
    y = experts_on_cpu(torch.randn(3, 6), ids, torch.rand(3, 1), bank, ExpertsSpec(rows="plain"), hidden)
    assert y.isfinite().all() and hidden.rows is None


def test_many_rows_and_columns_are_kept_whole():
    """Several tasks, tiles and segments: more than 256 rows of one expert, and widths that no vector divides."""
    spec = ExpertsSpec()
    w_in, w_out = torch.randn(2, 2 * 131, 70) / 8, torch.randn(2, 70, 131)
    bank = ListExpertWeights([list(w_in)], list(w_out))
    x, ids = torch.randn(700, 70), torch.tensor([[0], [1], [0], [0]] * 175)
    hidden = Hidden()
    experts_on_cpu(x, ids, torch.rand(700, 1), bank, spec, hidden)
    order = ids.reshape(-1).argsort(stable=True)
    want = torch.stack([w_in[ids[row, 0]].double() @ x[row].double() for row in order])
    torch.testing.assert_close(hidden.rows.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())
