"""Rules for what picks, and writes, parts of each row's features: by fixed places, or by integers of the row itself.

y = h[:, [0, 2], [1, 3]]        places that are the same for every row
y = h.gather(-1, h.argsort())   places of each row's own
h[:, ::2] = z                   a part of each row is written
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.recognise.row_graph_windows import Rule
from moeopt.recognise.row_graph_writer import HeldSlots, RowGraphWriter

aten = torch.ops.aten


def _pick(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """gather and scatter along a dimension of the features: each row is read and written by its own indices."""
    if op_name(node) == "gather" and len(held.features) == 1:
        places = graph.known[node.args[2]]  # type: ignore[index]
        same = places.lead is None and math.prod(places.shape[:-1]) == 1
        if same and tuple(node.meta["shape"][:-1]) == held.lead:  # the same for every row, and read for every row
            return _select(graph, node, held, -1, places)
    operands = [graph.known[a] for a in node.all_input_nodes]
    if any(o.lead != held.lead or len(o.shape) != len(held.shape) for o in operands):
        raise graph.refused(node, "picks by indices of other rows, or of all rows")
    args = list(graph.words(node.args))
    args[1] = graph.feature_dim(node, held, node.args[1])
    return graph.add(node, node.target, held.lead, *args, **graph.kwargs(node))


def _select(graph: RowGraphWriter, node: fx.Node, held: HeldSlots, dim: int, places: HeldSlots) -> HeldSlots:
    """The features of each row at ``places``, integers of the weights."""
    flat = graph.add(node, aten.reshape.default, None, places.number, [-1])
    return graph.add(node, aten.index_select.default, held.lead, held.number, dim, flat.number)


def _index(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """index, index_select, embedding: features at fixed places, or the rows of a table at integers of each row."""
    name, args = op_name(node), list[Any](node.args)
    if name == "index":
        given = [(d, a) for d, a in enumerate(args[1]) if a is not None]
    else:
        given = [(0, args[1])] if name == "embedding" else [(int(args[1]), args[2])]
    if len(given) > 1:
        return _places(graph, node, held)
    ((dim, at),) = given
    if at.meta["dtype"] in (torch.bool, torch.uint8):
        raise graph.refused(
            node,
            "picks by a mask, so that its values decide a size; keep the places as integers (mask.nonzero()[:, 0])",
        )
    source, places = graph.known[args[0]], graph.known[at]
    if source.lead is None and places.lead is not None and dim == 0:
        return graph.add(node, aten.index.Tensor, places.lead, source.number, [places.number])
    if source.lead is None or places.lead is not None or len(places.shape) != 1:
        raise graph.refused(node, "picks by indices of other rows, or of all rows")
    return _select(graph, node, source, graph.feature_dim(node, source, dim), places)


def _places(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """index and index_put by places in dimensions of the features that stand side by side, the same for every row."""
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    given = [d for d, a in enumerate(indices) if a is not None]
    places, lead = [graph.known[indices[d]] for d in given], len(held.lead or ())
    if held.lead is None or given[0] < lead or any(p.lead is not None for p in places):
        raise graph.refused(node, "picks by indices of other rows, or of all rows")
    if given != list(range(given[0], given[-1] + 1)):
        raise graph.refused(node, "picks by several indices in dimensions that do not stand side by side")
    if any(indices[d].meta["dtype"] in (torch.bool, torch.uint8) for d in given):
        raise graph.refused(node, "picks by a mask, so that its values decide a size")
    words = [None, *graph.words(indices[lead:])]
    if op_name(node) == "index":
        return graph.add(node, node.target, held.lead, held.number, words)
    values = graph.known[node.args[2]]  # type: ignore[index]
    if values.lead != held.lead and math.prod(values.shape) != 1:
        raise graph.refused(node, "writes values of other rows, or of all rows")
    return graph.add(node, node.target, held.lead, held.number, words, values.number, *node.args[3:])


def _write_part(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """slice_scatter, select_scatter: a part of each row's features is replaced by rows."""
    into, part = (graph.known[a] for a in node.args[:2])  # type: ignore[index]
    if into.lead is None or part.lead != into.lead:
        raise graph.refused(node, "writes values of other rows, or of all rows")
    if part.shape == into.shape and op_name(node) == "slice_scatter":
        return part
    dim = graph.feature_dim(node, into, node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0))
    return graph.add(node, node.target, into.lead, into.number, part.number, dim, *node.args[3:], **graph.kwargs(node))


def _copied(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """What is written over a whole tensor of rows."""
    into, source = (graph.known[a] for a in node.args[:2])  # type: ignore[index]
    if source.lead is None or into.lead != source.lead or into.shape != source.shape:
        raise graph.refused(node, "writes values of other rows, or of all rows")
    return graph.add(node, aten._to_copy.default, source.lead, source.number, dtype=node.meta["dtype"])


def _added_at(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """index_add, index_copy: parts of each row are added, or written, at places that are the same for every row."""
    into, places, part = (graph.known[a] for a in (node.args[0], node.args[2], node.args[3]))  # type: ignore[index]
    if into.lead is None or part.lead != into.lead or places.lead is not None:
        raise graph.refused(node, "picks by indices of other rows, or of all rows")
    dim = graph.feature_dim(node, into, node.args[1])
    return graph.add(
        node, node.target, into.lead, into.number, dim, places.number, part.number, *node.args[4:], **graph.kwargs(node)
    )


PICK_RULES: dict[str, Rule] = {
    **dict.fromkeys(("index", "index_select", "embedding"), _index),
    **dict.fromkeys(("gather", "scatter", "scatter_add"), _pick),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _write_part),
    **dict.fromkeys(("index_add", "index_copy"), _added_at),
    "index_put": _places,
    "copy": _copied,
}
"""By the op's name."""
