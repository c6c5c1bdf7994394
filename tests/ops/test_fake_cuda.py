"""Tracing the op on CUDA tensors needs no GPU: fake tensors have a device, and no values."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, StackedExpertWeights, experts

T, K, E, H, I = 5, 2, 3, 8, 16


def tensors(stacked, dtype):
    def weight(*shape):
        return torch.empty(*shape, device="cuda", dtype=dtype)

    if stacked:
        bank = StackedExpertWeights([weight(E, 2 * I, H)], weight(E, H, I))
    else:
        bank = ListExpertWeights([[weight(I, H) for _ in range(E)] for _ in range(2)], [weight(H, I) for _ in range(E)])
    ids = torch.empty(T, K, device="cuda", dtype=torch.int64)
    return weight(T, H), ids, weight(T, K), bank


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("stacked", (True, False))
def test_the_op_is_one_node_that_holds_every_weight(stacked, dtype):
    spec = ExpertsSpec(rows="gate|up" if stacked else "separate", out_dtype="float32")
    with FakeTensorMode():
        x, ids, weights, bank = tensors(stacked, dtype)
        graph = make_fx(lambda x, ids, weights: experts(x, ids, weights, bank, spec))(x, ids, weights).graph
        y = experts(x, ids, weights, bank, spec)
    assert (y.shape, y.dtype, y.device.type) == ((T, H), torch.float32, "cuda")
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    assert node.target is torch.ops.moeopt.experts.default
    assert [len(part) for part in node.args[3:5]] == ([1, 1] if stacked else [2 * E, E])


def test_an_address_under_a_tracer_is_no_address():
    """Why the kernels' table of addresses is made inside the op, which no tracer enters."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once a process
        assert torch.empty(2, device="cuda").data_ptr() == 0
