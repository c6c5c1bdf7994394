"""Rules for layers of images and sequences that an expert makes of each row's own features.

Pools and resizing work on each plane by itself, so rows may stand for images or for channels. Convolutions and windows
(im2col) join channels: each row is one image there, and so it is in products of two matrices of each row (bmm), in
distances between its parts, and where it is read at places of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.ir.row_function import RowCount
from moeopt.recognise.row_graph_writer import HeldSlots, RowGraphWriter

aten = torch.ops.aten
_NO_PRODUCTS = 2
"""The mode of ``cdist`` that does not depend on how many rows there are."""
Rule = Callable[[RowGraphWriter, fx.Node, HeldSlots], HeldSlots]


def _planes(dims: int, images: bool = False) -> Rule:
    """An op on the last ``dims`` dimensions; one for ``images`` takes no channels alone."""

    def rule(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
        if len(held.features) not in ((dims + 1,) if images else (dims, dims + 1)):
            raise graph.refused(node, "works across rows")
        return _same(graph, node, held)

    return rule


def _images(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Each row is one image, and what else is read is of weights."""
    others = [graph.known[a] for a in node.args[1:] if isinstance(a, fx.Node)]  # the image itself among them
    if len(held.lead or ()) != 1 or len(held.shape) < 3 or any(o.lead is not None for o in others):
        raise graph.refused(node, "is not known to work on each row by itself")
    if op_name(node) in ("im2col", "col2im") and len(held.shape) != (4 if op_name(node) == "im2col" else 3):
        raise graph.refused(node, "works across rows")
    return _same(graph, node, held)


def _matrices(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    operands = [graph.known[a] for a in node.all_input_nodes]
    if any(o.lead != held.lead or len(o.shape) != 3 for o in operands) or len(held.lead or ()) != 1:
        raise graph.refused(
            node,
            "multiplies all rows by several matrices at once (a matrix of blocks, or a sum of all experts' weights for "
            "each row); multiply each block of the features by its own matrix",
        )
    return _same(graph, node, held)


def _padded(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Numbers beside the features; the amounts are told from the last dimension on."""
    _, amounts, *value = list[Any](node.args)
    while len(amounts) > 2 * len(held.features) and not any(amounts[-2:]):
        amounts = amounts[:-2]
    if len(amounts) > 2 * len(held.features):
        raise graph.refused(node, "works across rows")
    return graph.add(node, node.target, held.lead, held.number, list(amounts), *value)


def _sampled(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Each row is one image, and has the places at which it is read."""
    image, places = (graph.known[a] for a in node.args[:2])  # type: ignore[index]
    if len(image.lead or ()) != 1 or image.lead != places.lead or len(image.shape) != len(places.shape):
        raise graph.refused(node, "reads images at places of other rows")
    return _same(graph, node, held)


def _grid(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """The places of an affine map of each row's own."""
    _, sizes, *more = list[Any](node.args)
    if held.lead != (sizes[0],) or len(held.features) != 2:
        raise graph.refused(node, "makes places for other rows")
    return graph.add(node, node.target, held.lead, held.number, [RowCount(), *sizes[1:]], *more)


def _distances(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Of a row, or of parts of a row, to centers that are weights; or to parts of the same row."""
    left, right = (graph.known[a] for a in node.args[:2])  # type: ignore[index]
    centers = left.lead is not None and right.lead is None and len(right.shape) == 2
    parts = left.lead is not None and left.lead == right.lead and len(left.features) == len(right.features) == 2
    if not centers and not parts:
        raise graph.refused(node, "compares rows with one another")
    power = node.args[2] if len(node.args) > 2 else 2.0
    return graph.add(node, node.target, left.lead, left.number, right.number, power, _NO_PRODUCTS)


def _repeat(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    lead, many = len(held.lead or ()), list(node.args[1])  # type: ignore[arg-type]
    if len(many) != len(held.shape) or any(n != 1 for n in many[:lead]):
        raise graph.refused(node, "repeats rows")
    return graph.add(node, node.target, held.lead, held.number, [1, *many[lead:]])


def _roll(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims", [])
    if not dims:
        raise graph.refused(node, "works across rows")
    settled = [graph.feature_dim(node, held, d) for d in dims]  # type: ignore[union-attr]
    return graph.add(node, node.target, held.lead, held.number, node.args[1], settled)


def _quarter_turns(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    times, dims = list[Any]([*node.args[1:], *([1, [0, 1]][len(node.args) - 1 :])])
    settled = [graph.feature_dim(node, held, d) for d in dims]
    return graph.add(node, node.target, held.lead, held.number, times, settled)


def _crossed(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Vectors of a row with vectors of the same row, or with weights that are the same for all rows."""
    operands = [graph.known[a] for a in node.args[:2]]  # type: ignore[index]
    rows = next(o for o in operands if o.lead is not None)
    count = len(rows.lead or ())
    if any(o.lead != rows.lead and (o.lead is not None or math.prod(o.shape[:count]) != 1) for o in operands):
        raise graph.refused(node, "gives rows different weights by their place")
    dim = graph.feature_dim(node, rows, node.kwargs.get("dim", -1))
    flat = [
        o.number if o.lead is not None or count == 1
        else graph.add(node, aten.reshape.default, None, o.number, [1, *o.shape[count:]]).number
        for o in operands
    ]  # fmt: skip
    return graph.add(node, node.target, rows.lead, *flat, dim=dim)


def _cross_of_any(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    raise graph.refused(
        node,
        "without dim runs along the first dimension of size 3, which is that of the rows where the expert is given 3; "
        "write torch.linalg.cross(a, b), or torch.cross(a, b, dim=-1)",
    )


def _attention(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """Among the parts of each row, (M, heads, parts, features); a mask is the row's own, or the same for all rows."""
    read, mask = [graph.known[a] for a in node.args[:3]], node.kwargs.get("attn_mask")  # type: ignore[index]
    if any(o.lead != held.lead or len(o.features) != 3 for o in read) or len(held.lead or ()) != 1:
        raise graph.refused(node, "compares rows with one another")
    seen = None if mask is None else graph.known[mask]  # type: ignore[index]
    if seen is not None and seen.lead != held.lead and (seen.lead is not None or math.prod(seen.shape[:-3]) != 1):
        raise graph.refused(node, "gives rows different weights by their place")
    return _same(graph, node, held)


def _same(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    found = graph.add(node, node.target, held.lead, *graph.words(node.args), **graph.kwargs(node))
    if node.meta.get("shape") is None:  # several results
        found.items, found.shape = [], held.shape
    return found


WINDOW_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d"), _planes(2)
    ),
    **dict.fromkeys(("avg_pool3d", "max_pool3d_with_indices", "_adaptive_avg_pool3d"), _planes(3)),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _planes(2, True)),
    **dict.fromkeys(("tril", "triu"), _planes(1, True)),
    **dict.fromkeys(("upsample_nearest3d", "upsample_trilinear3d"), _planes(3, True)),
    "channel_shuffle": _images,
    "constant_pad_nd": _padded,
    "grid_sampler_2d": _sampled,
    "affine_grid_generator": _grid,
    **dict.fromkeys(("cdist", "_cdist_forward"), _distances),
    **dict.fromkeys(("reflection_pad1d", "replication_pad1d"), _planes(1)),
    **dict.fromkeys(("reflection_pad2d", "replication_pad2d"), _planes(2)),
    **dict.fromkeys(("upsample_nearest1d", "upsample_linear1d"), _planes(1, True)),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), _planes(2, True)),
    **dict.fromkeys(("convolution", "im2col", "col2im"), _images),
    "bmm": _matrices,
    "rot90": _quarter_turns,
    "linalg_cross": _crossed,
    "cross": _cross_of_any,
    "scaled_dot_product_attention": _attention,
    "repeat": _repeat,
    "roll": _roll,
}
"""By the op's name."""
