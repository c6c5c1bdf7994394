"""What a call does to rows, decided by its op alone."""

import operator

import pytest
import torch
from torch import fx

from moeopt.capture.op_kinds import is_factory, is_matmul, is_pointwise, moves_rows, op_name

aten = torch.ops.aten
KINDS = (moves_rows, is_pointwise, is_matmul, is_factory)


def node(target, *args):
    graph = fx.Graph()
    return graph.call_function(target, tuple(graph.placeholder(f"x{i}") for i in range(2)) + args)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        (
            moves_rows,
            "view.default slice.Tensor index.Tensor gather.default cat.default permute.default index_put.default",
        ),
        (moves_rows, "_to_copy.default constant_pad_nd.default split.Tensor repeat_interleave.self_Tensor"),
        (
            is_pointwise,
            "add.Tensor mul.Scalar silu.default gelu.default where.self clamp.default sigmoid.default exp.default",
        ),
        (
            is_matmul,
            "mm.default addmm.default bmm.default baddbmm.default convolution.default linear.default mv.default",
        ),
        (is_factory, "zeros.default arange.start new_zeros.default full_like.default"),
        (
            None,
            "sum.dim_IntList topk.default softmax.int _softmax.default index_add.default native_layer_norm.default sort.default",  # noqa: E501
        ),
    ],
)
def test_each_op_is_of_one_kind(kind, targets):
    for name in targets.split():
        op, overload = name.split(".")
        call = node(getattr(getattr(aten, op), overload))
        assert op_name(call) == op
        assert [k for k in KINDS if k(call)] == ([kind] if kind else []), name


def test_getitem_moves_and_placeholders_do_nothing():
    pick = node(operator.getitem)
    assert op_name(pick) == "getitem" and moves_rows(pick) and not is_pointwise(pick)
    placeholder = fx.Graph().placeholder("x")
    assert op_name(placeholder) == "placeholder" and not any(k(placeholder) for k in KINDS)
