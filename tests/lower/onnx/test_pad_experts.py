"""Experts filled up with neurons of zeros: one size, the same function."""

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.lower.onnx.pad_experts import pad_experts
from moeopt.ops.expert_weights import ListExpertWeights, StackedExpertWeights
from moeopt.ops.reference import experts_reference

H, SIZES = 6, (4, 3, 5)


def uneven(spec: ExpertsSpec, bias: bool = True) -> ListExpertWeights:
    """Random float64 experts of ``SIZES`` neurons."""
    rng = torch.Generator().manual_seed(0)

    def tensor(*shape, layout="oi"):
        made = torch.randn(shape, generator=rng, dtype=torch.float64)
        return made if layout == "oi" else made.t().contiguous()

    widths = {"separate": (1, 1), "plain": (1,)}.get(spec.rows, (2,))
    w_in = [[tensor(n * I, H, layout=spec.w_in_layout) for I in SIZES] for n in widths]
    w_out = [tensor(H, I, layout=spec.w_out_layout) for I in SIZES]
    b_in = [[tensor(n * I) for I in SIZES] for n in widths] if bias else None
    return ListExpertWeights(w_in, w_out, b_in, [tensor(H), None, None] if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid", "softplus"])
@pytest.mark.parametrize("rows", ["plain", "separate", "interleaved", "interleaved_up", "gate|up", "up|gate"])
@pytest.mark.parametrize("layouts", [("oi", "oi"), ("io", "oi"), ("oi", "io")])
def test_the_same_function_in_one_size(rows, layouts, activation, bias):
    spec = ExpertsSpec(rows=rows, w_in_layout=layouts[0], w_out_layout=layouts[1], activation=activation)
    bank = uneven(spec, bias)
    filled = pad_experts(bank, spec)
    assert {w.shape for e in range(3) for w in filled.w_in(e)} == {filled.w_in(0)[0].shape}
    assert {filled.w_out(e).shape for e in range(3)} == {(H, 5) if layouts[1] == "oi" else (5, H)}
    assert filled.num_experts == 3 and filled.stacked() is None and filled.norm(0) is None
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, ones = torch.arange(3).expand(7, 3), x.new_ones(7, 3)
    want = experts_reference(x, ids, ones, bank, spec)
    got = experts_reference(x, ids, ones, filled, spec)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)  # a product of another width may sum in another order


def test_what_needs_no_filling_stays_itself():
    plain = ExpertsSpec(rows="plain")
    same = ListExpertWeights([[torch.ones(4, H)] * 2], [torch.ones(H, 4)] * 2)
    stacked = StackedExpertWeights([torch.ones(2, 4, H)], torch.ones(2, H, 4))
    assert pad_experts(same, plain) is same and pad_experts(stacked, plain) is stacked
