"""What each op may do with the features of a row: the rules by which calls on rows are written into the graph.

A rule adds the graph's form of one call, or raises ``Declined`` where the call would touch the rows themselves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.ir.row_function import GETITEM, RowCount
from moeopt.recognise.row_graph_picks import PICK_RULES
from moeopt.recognise.row_graph_windows import WINDOW_RULES, Rule
from moeopt.recognise.row_graph_writer import HeldSlots, RowGraphWriter
from moeopt.value_types import PyObject

aten = torch.ops.aten
_REDUCTIONS = (
    "sum", "mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "logsumexp", "linalg_vector_norm", "prod",
    "norm", "nansum", "aminmax",
)  # fmt: skip
_ALONG = (
    "softmax",
    "_softmax",
    "_safe_softmax",
    "log_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "glu",
    "flip",
)
_NORMS = ("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
_BATCH_NORMS = ("_native_batch_norm_legit_no_training", "native_batch_norm", "_batch_norm_no_update")


def _product(graph: RowGraphWriter, node: fx.Node, _: HeldSlots) -> HeldSlots:
    """mm, addmm, mv, linear: rows on the left, a weight on the right."""
    name = op_name(node)
    if (linear := graph.as_linear(node)) is not None:
        x, weight, bias = (None if a is None else graph.known[a] for a in linear)
        if x is None or weight is None or x.lead is None or len(x.features) != 1:
            raise graph.refused(node, "multiplies rows with one another")
        more = () if bias is None else (bias.number,)
        return graph.add(node, aten.linear.default, x.lead, x.number, weight.number, *more)
    left, right = node.args[1:3] if name in ("addmm", "addmv") else node.args[:2]
    rows, weight = graph.known[left], graph.known[right]  # type: ignore[index]
    if rows.lead is None or weight.lead is not None or len(rows.features) != 1:
        raise graph.refused(node, "multiplies rows with one another, or from the right")
    if name in ("addmm", "addmv"):
        bias = graph.known[node.args[0]]  # type: ignore[index]
        if bias.lead is None and len(bias.shape) > 1 and bias.shape[0] != 1:
            raise graph.refused(node, "gives rows different weights by their place")
    return graph.add(node, node.target, rows.lead, *graph.words(node.args), **graph.kwargs(node))


def _view(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Features cut or joined within each row; the parts of a row may count as rows of their own for a while."""
    shape, every = tuple(node.meta["shape"]), math.prod(graph.lead)
    counts = [math.prod(shape[:split]) for split in range(1, len(shape) + 1)]
    whole = [c for c in (every, math.prod(held.lead or ())) if c in counts]
    parts = [c for c in counts if c > every and c % every == 0]
    for count in [*whole, *parts][:1]:
        split = counts.index(count) + 1
        if shape[split:] == held.features:
            return HeldSlots(held.number, shape[:split], shape)
        return graph.add(node, aten.reshape.default, shape[:split], held.number, [-1, *shape[split:]])
    raise graph.refused(node, "joins features of different rows")


def _turn(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    rank, lead = len(held.shape), len(held.lead or ())
    order, given = list(range(rank)), list[Any](node.args)
    if op_name(node) == "permute":
        order = [int(d) % rank for d in given[1]]
    else:
        a, b = (0, 1) if op_name(node) == "t" else (int(given[1]) % rank, int(given[2]) % rank)
        order[a], order[b] = order[b], order[a]
    if order[:lead] != list(range(lead)):
        raise graph.refused(node, "turns rows into features")
    return graph.add(node, aten.permute.default, held.lead, held.number, [0, *(d - lead + 1 for d in order[lead:])])


def _one_dim(at: int, extra: int = 0, default: PyObject = None) -> Rule:
    """An op with one dimension among its arguments, at ``at``; it must be one of the features'."""

    def rule(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
        if op_name(node) == "slice" and node.meta["shape"] == held.shape:
            return held
        args, kwargs = list(graph.words(node.args)), graph.kwargs(node)
        dim = node.args[at] if len(node.args) > at else node.kwargs.get("dim", default)
        if dim is None or (op_name(node) == "squeeze" and isinstance(dim, (list, tuple))):
            raise graph.refused(node, "works across rows")
        settled = graph.feature_dim(node, held, dim, extra)
        if len(args) > at:
            args[at] = settled
        else:  # by its name: a stable sort takes it in no other way
            kwargs["dim"] = settled
        found = graph.add(node, node.target, held.lead, *args, **kwargs)
        if node.meta.get("shape") is None:  # several results
            found.items, found.shape = [], held.shape
        return found

    return rule


def _reduce(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """The dimensions are the first list, or the second or third argument that may be one."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index("dim") if "dim" in names else -1
    dims = node.args[at] if 0 <= at < len(node.args) else node.kwargs.get("dim")
    if at < 0 or dims is None or dims == []:
        raise graph.refused(node, "works across rows")
    every = [graph.feature_dim(node, held, d) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    args, kwargs = list(graph.words(node.args)), graph.kwargs(node)
    settled: PyObject = every if isinstance(dims, (list, tuple)) else every[0]
    if at < len(args):
        args[at] = settled
    else:
        kwargs["dim"] = settled
    found = graph.add(node, node.target, held.lead, *args, **kwargs)
    if node.meta.get("shape") is None:  # a variance and a mean
        found.items, found.shape = [], held.shape
    return found


def _norm(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    if len(node.args[1]) > len(held.features):  # type: ignore[arg-type]
        raise graph.refused(node, "works across rows")
    found = graph.add(node, node.target, held.lead, *graph.words(node.args), **graph.kwargs(node))
    if node.meta.get("shape") is None:
        found.items, found.shape = [found], held.shape
    return found


def _batch_norm(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    training = op_name(node) == "native_batch_norm" and bool(node.args[5])
    if training and node.args[3] is None and len(held.lead or ()) == 2 and held.lead[0] == 1:  # type: ignore[index]
        return _instance_norm(graph, node, held)
    if training or len(held.lead or ()) != 1 or not held.features:
        raise graph.refused(node, "takes statistics of the batch, so a row's result depends on other rows")
    found = graph.add(node, node.target, held.lead, *graph.words(node.args), **graph.kwargs(node))
    found.items, found.shape = [found], held.shape
    return found


def _instance_norm(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Each of the C channels of each row by itself: PyTorch lays all of them side by side, (1, M C, ...), and repeats
    the weights of C for each row."""
    _, *scales, _, _, _, _, eps = list[Any](node.args[:8])
    sizes, channels = list(held.features), (held.lead or (1, 0))[1] // math.prod(graph.lead)
    normed = graph.add(node, aten.native_layer_norm.default, None, held.number, sizes, None, None, eps)
    value = graph.add(node, GETITEM, None, normed.number, 0)
    if any(scale is not None for scale in scales):
        value = graph.add(node, aten.reshape.default, None, value.number, [-1, channels, *sizes])
        for scale, op in zip(scales, (aten.mul.Tensor, aten.add.Tensor), strict=True):
            each = None if scale is None else [channels, *(1 for _ in sizes)]
            if each is not None:
                factor = graph.add(node, aten.reshape.default, None, graph.known[scale].number, each)
                value = graph.add(node, op, None, value.number, factor.number)
        value = graph.add(node, aten.reshape.default, None, value.number, [-1, *sizes])
    value.lead, value.shape = held.lead, held.shape
    return HeldSlots(int(value.number), held.lead, held.shape, items=[value])


def _group_norm(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    if len(held.lead or ()) != 1 or node.args[3] != held.shape[0] or held.lead != (math.prod(graph.lead),):
        raise graph.refused(node, "works across rows")
    args = list(graph.words(node.args))
    args[3] = RowCount()
    found = graph.add(node, node.target, held.lead, *args)
    found.items, found.shape = [found], held.shape
    return found


def _item(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    given = list[Any](node.args)
    name, which = op_name(given[0]), int(given[1])
    if (name in _NORMS or name in _BATCH_NORMS or name == "native_group_norm") and which:
        raise graph.refused(node, "reads a statistic of a norm")
    if held.items and held.items[0] is not held:
        return held.items[which]
    return graph.add(node, GETITEM, held.lead, held.number, which)


def _expand(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    lead, shape = held.lead or (), tuple(node.meta["shape"])
    if len(shape) != len(held.shape) or shape[: len(lead)] != lead:
        raise graph.refused(node, "repeats rows")
    return graph.add(node, aten.expand.default, held.lead, held.number, [-1, *shape[len(lead) :]])


def _join(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    parts = [graph.known[a] for a in node.args[0]]  # type: ignore[union-attr,index]
    if len({p.lead for p in parts}) > 1 or held.lead is None:
        raise graph.refused(node, "joins rows with weights")
    dim = graph.feature_dim(node, held, node.args[1] if len(node.args) > 1 else 0, op_name(node) == "stack")
    return graph.add(node, node.target, held.lead, [p.number for p in parts], dim)


def _like(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    return graph.add(node, node.target, held.lead, *graph.words(node.args), **graph.kwargs(node))


def _trilinear(graph: RowGraphWriter, node: fx.Node, _: HeldSlots) -> HeldSlots:
    """x^T W_o y of ``torch.nn.Bilinear``: the rows x times all W_o at once, then each row's own y."""
    x, weight, y = (graph.known[a] for a in node.args[:3])  # type: ignore[index]
    if list(node.args[3:7]) != [[1, 3], [0], [1, 2], [2, 3]] or x.lead is None or y.lead != x.lead or weight.lead:
        raise graph.refused(node, "multiplies rows with one another")
    o, i, j = weight.shape
    turned = graph.add(node, aten.permute.default, None, weight.number, [1, 0, 2])
    matrix = graph.add(node, aten.reshape.default, None, turned.number, [i, o * j])
    product = graph.add(node, aten.mm.default, x.lead, x.number, matrix.number)
    apart = graph.add(node, aten.reshape.default, x.lead, product.number, [-1, o, j])
    other = graph.add(node, aten.unsqueeze.default, x.lead, y.number, -2)
    weighed = graph.add(node, aten.mul.Tensor, x.lead, apart.number, other.number)
    return graph.add(node, aten.sum.dim_IntList, x.lead, weighed.number, [-1])


def _ranks(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Where each number of a row stands among the sorted numbers of a weight, or of the row itself."""
    given = [graph.known[a] for a in node.args[:2]]  # type: ignore[index]
    values, bounds = given if op_name(node) == "bucketize" else given[::-1]
    own = bounds.lead == values.lead and len(bounds.features) == len(values.features) > 0  # else rows are ranked
    if values.lead is None or not (own or (bounds.lead is None and len(bounds.shape) == 1)):
        raise graph.refused(node, "ranks rows among numbers of other rows")
    return graph.add(node, node.target, values.lead, *graph.words(node.args), **graph.kwargs(node))


def _transform(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    _, dims, *more = list[Any](node.args)
    rank = 1 + len(held.features)  # these take no dimensions counted from the right
    settled = [rank + graph.feature_dim(node, held, d) for d in dims]
    return graph.add(node, node.target, held.lead, held.number, settled, *more)


def _diagonal(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    given = (list[Any](node.args[1:]) + [0, 0, 1][len(node.args) - 1 :])[:3]
    named = [node.kwargs.get("dim1", given[1]), node.kwargs.get("dim2", given[2])]
    dims = [graph.feature_dim(node, held, d) for d in named]
    return graph.add(node, node.target, held.lead, held.number, node.kwargs.get("offset", given[0]), *dims)


def _flip(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    dims = [graph.feature_dim(node, held, d) for d in node.args[1]]  # type: ignore[union-attr]
    return graph.add(node, node.target, held.lead, held.number, dims)


RULES: dict[str, Rule] = {
    **WINDOW_RULES,
    **PICK_RULES,
    **dict.fromkeys(("mm", "addmm", "mv", "addmv", "linear"), _product),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "_reshape_alias"), _view),
    **dict.fromkeys(("t", "transpose", "permute"), _turn),
    **dict.fromkeys(_ALONG, _one_dim(1, default=-1)),
    **dict.fromkeys(("select", "slice", "unbind"), _one_dim(1, default=0)),
    "unfold": _one_dim(1),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _one_dim(2, default=0)),
    **dict.fromkeys(("sort", "argsort"), _one_dim(1, default=-1)),
    **dict.fromkeys(("topk", "kthvalue"), _one_dim(2, default=-1)),
    **dict.fromkeys(("max", "min", "median", "nanmedian", "mode", "cummax", "cummin", "argmax", "argmin"), _one_dim(1)),
    "_trilinear": _trilinear,
    "squeeze": _one_dim(1),
    "unsqueeze": _one_dim(1, extra=1),
    **dict.fromkeys(("bucketize", "searchsorted"), _ranks),
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), _transform),
    **dict.fromkeys(("view_as_real", "view_as_complex"), _like),
    "diagonal": _diagonal,
    "flip": _flip,
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    "native_group_norm": _group_norm,
    "getitem": _item,
    "expand": _expand,
    **dict.fromkeys(("cat", "stack"), _join),
    **dict.fromkeys(("ones_like", "zeros_like", "full_like"), _like),
}
