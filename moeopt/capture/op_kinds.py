"""What an ATen call does to rows: moves them, works on each element, or neither."""

from __future__ import annotations

import operator
from functools import cache

import torch
from torch import fx

from moeopt.value_types import FxArg, FxTarget

aten = torch.ops.aten

_MOVES = {
    "view", "reshape", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "select", "slice", "unsqueeze",
    "squeeze", "expand", "split", "split_with_sizes", "unbind", "clone", "_to_copy", "detach", "alias", "contiguous",
    "cat", "stack", "index", "index_select", "gather", "slice_scatter", "select_scatter", "as_strided", "repeat",
    "masked_select", "constant_pad_nd", "flip", "roll", "copy", "lift_fresh", "lift_fresh_copy", "index_put", "view_as",
    "as_strided_scatter", "movedim", "swapaxes", "narrow", "chunk", "expand_as", "repeat_interleave", "scatter",
    "index_copy", "unfold", "masked_scatter", "take", "take_along_dim", "diagonal", "tile",
}  # fmt: skip
# ATen does not tag all of them as pointwise: hardswish, glu and the in-kernel forms of prelu are among the untagged
_POINTWISE = {"hardswish", "clamp", "gelu",
              "silu", "mish", "softplus", "hardtanh", "glu", "elu", "leaky_relu", "celu", "selu",
              "where", "_prelu_kernel", "prelu", "dropout", "masked_fill", "native_dropout"}  # fmt: skip
_MATMULS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm_fallback", "convolution", "linear", "mv",
            "addmv", "_scaled_grouped_mm", "matmul"}  # fmt: skip
_FACTORIES = {"zeros", "ones", "full", "empty", "arange", "eye", "zeros_like", "ones_like", "empty_like", "full_like",
              "new_zeros", "new_empty", "new_full", "new_ones", "scalar_tensor", "linspace"}  # fmt: skip

GATES = ("_softmax", "softmax", "sigmoid")
"""What makes the weights of a mixture."""
CHOICES_AMONG = ("topk", "argmax", "kthvalue", "sort", "argsort")
"""What chooses among the things that its scores are of; a top-k of a file is the first of a sort."""
WEIGH = ("mul", "bmm", "mm", "baddbmm", "addcmul")
"""What multiplies the results of experts by them."""


@cache
def _name(target: FxTarget) -> str:
    schema = getattr(target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else getattr(target, "__name__", str(target))


def op_name(node: fx.Node) -> str:
    """``mm`` for ``aten.mm.default``; ``getitem``; the op kind for placeholders."""
    return _name(node.target) if node.op == "call_function" else node.op


def moves_rows(node: fx.Node) -> bool:
    """True for pure data movement: every output element is a copy of an input element (or a fill)."""
    return node.target is operator.getitem or (node.op == "call_function" and op_name(node) in _MOVES)


@cache
def _pointwise(target: FxTarget) -> bool:
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags or _name(target) in _POINTWISE


def is_pointwise(node: fx.Node) -> bool:
    """True where output element i depends only on element i of each (broadcast) operand."""
    return node.op == "call_function" and node.target is not operator.getitem and _pointwise(node.target)


def is_matmul(node: fx.Node) -> bool:
    """True for the matmuls that an expert can be written with."""
    return node.op == "call_function" and op_name(node) in _MATMULS


def is_times_one(node: fx.Node) -> bool:
    """True for ``x * 1``, a copy."""
    one = node.args[1] if op_name(node) == "mul" else None
    return isinstance(one, (int, float)) and one == 1 and isinstance(node.args[0], fx.Node)


def is_factory(node: fx.Node) -> bool:
    """True for calls that make a tensor from sizes and scalars alone."""
    return node.op == "call_function" and op_name(node) in _FACTORIES


def picks_rows(node: fx.Node) -> bool:
    """True where ``node`` holds rows that an index picked, moved since or not."""
    for _ in range(8):
        if op_name(node) in ("index", "index_select", "masked_select"):
            return True
        if not moves_rows(node) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def gathers_chosen_rows(node: fx.Node) -> bool:
    """True where ``node`` holds rows gathered by a choice among them, as of the tokens that an expert chose; moved
    since or not."""
    for _ in range(8):
        if op_name(node) == "gather":
            places: FxArg = node.args[2]
            while isinstance(places, fx.Node) and moves_rows(places) and places.all_input_nodes:
                places = places.all_input_nodes[0]
            rank = len(node.all_input_nodes[0].meta.get("shape") or ())
            return op_name(places) in ("topk", "sort", "argsort") and int(node.args[1]) % max(rank, 1) < rank - 1  # type: ignore[arg-type]
        if not moves_rows(node) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False
