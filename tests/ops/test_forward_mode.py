"""A custom op has no tangents: it says so, where PyTorch would give zeros."""

import pytest
import torch
from torch.autograd import forward_ad

from moeopt.ir.specs import ExpertsSpec
from tests.ops import test_quantized_experts, test_row_function

ops = torch.ops.moeopt


def of_experts(x):
    w_in, w_out = torch.ones(2, 5, x.shape[1]), torch.ones(2, 3, 5)
    ids = torch.arange(len(x))[:, None] % 2
    return ops.experts(x, ids, torch.ones(ids.shape), [w_in], [w_out], [], [], [], ExpertsSpec(rows="plain").encode())


def of_codes(x):
    _, ids, weights, bank = test_quantized_experts.made()
    lists = test_quantized_experts.flatten(bank)
    return ops.quantized_experts(x, ids, weights, *lists, ExpertsSpec().encode(), bank.format.encode())


def of_rows(x):
    spec = test_row_function.SPECS[0]
    _, ids, weights = test_row_function.call(spec)
    return ops.row_function(x.double(), ids, weights, test_row_function.weights(), spec.encode())


CALLS = {
    "experts": (of_experts, (4, 6)),
    "quantized_experts": (of_codes, (test_quantized_experts.T, test_quantized_experts.H)),
    "row_function": (of_rows, (test_row_function.T, test_row_function.H)),
    "route": (lambda logits: ops.route(logits, "softmax_topk", 2, True, "")[1], (4, 6)),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused(name):
    call, shape = CALLS[name]
    x = torch.randn(shape)
    assert call(x).isfinite().all()
    told = rf"moeopt::{name} has no forward-mode derivative .*; take it of the original model"
    with pytest.raises(RuntimeError, match=told):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=told):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    assert call(x).isfinite().all()
