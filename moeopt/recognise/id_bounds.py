"""Between which values expert ids lie, as the ops that made them say: a top-k over E scores gives 0 to E - 1.

Ids that are an argument, read from a table or computed in a way that is not known here may be any integers. What a
model does with one that names none of its experts (take the last for -1, drop it, raise) no ordinary probe shows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.tape import Call, Tape
from moeopt.capture.tree import leaves_of
from moeopt.recognise.ids_of_masks import mask_to_ids
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.routing_types import Routing
from moeopt.value_types import PyObject

IdBounds = tuple[int, int] | None
"""The least and the greatest value; None where any may come."""

_PAIRS = ("topk", "sort", "max", "min", "kthvalue", "mode")
"""They give (values, indices)."""
_INDICES = ("argmax", "argmin", "argsort", "multinomial")
_CASTS = ("to", "_to_copy", "type_as", "sort", "topk")
_FILLS = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}


def argument_bounds(call: Call) -> list[IdBounds]:
    """Of each tensor argument of a module's call, in order, as the model around it made them."""
    nodes = leaves_of(fx.Node, [call.args, call.kwargs])
    return [None if _float(node) else bounds(node) for node in nodes]


def takes_open_integers(call: Call) -> bool:
    """Whether an argument of a module's call may be any integers; a block of the same code may get bounded ones."""
    nodes = leaves_of(fx.Node, [call.args, call.kwargs])
    return any(n.meta.get("dtype") in (torch.int64, torch.int32) and bounds(n) is None for n in nodes)


def open_ids(tape: Tape, routing: Routing, experts: int, given: Sequence[IdBounds] = ()) -> torch.Tensor | None:
    """The ids (T, K) of the tape's call where another call may bring ids that neither name an expert nor occur here.

    None where the code itself sees to it that no such ids come, or its caller's: ``given`` holds the bounds of the
    tensor arguments.
    """
    extraction = routing.ids
    if extraction is None or extraction.source is None:
        return None
    if any(getattr(op, "__module__", "") == mask_to_ids.__module__ for op, _ in extraction.steps):
        return None  # made from a mask or a table: 0 to E
    ids = extraction.run(tape).long()
    placeholders = [node for node in tape.nodes if node.op == "placeholder"]
    by_node = dict(zip(placeholders, given, strict=True)) if len(given) == len(placeholders) else {}
    known = _union([bounds(node, given=by_node) for node in extraction.nodes])
    if not ids.numel():
        return None
    low, high = (int(v) for v in torch.aminmax(ids))
    if known is not None and known[0] >= min(low, 0) and known[1] <= max(high, experts - 1):
        return None
    return ids


def kept_by_caller(tape: Tape, found: Sequence[Recognition], given: Sequence[IdBounds]) -> tuple[IdBounds, ...]:
    """Of each tensor argument of the tape's call the bounds that some of the experts' ids rely on, in that only they
    say that each id names an expert; () where none do."""
    without = [[None if i == n else b for i, b in enumerate(given)] for n in range(len(given))]

    def relied_on(known: IdBounds, others: list[IdBounds]) -> bool:
        return known is not None and any(open_ids(tape, f.routing, len(f.experts), others) is not None for f in found)

    kept = tuple(known if relied_on(known, others) else None for known, others in zip(given, without, strict=True))
    return kept if any(kept) else ()


def bounds(node: fx.Node, depth: int = 24, given: Mapping[fx.Node, IdBounds] = MappingProxyType({})) -> IdBounds:
    """Between which values the integers of ``node`` lie on every call; ``given`` knows some placeholders."""
    if depth == 0 or node.op == "placeholder":
        return given.get(node)
    if node.op == "get_attr":  # a constant of the code; a buffer may be written
        value = node.meta.get("constant")
        return None if value is None or not value.numel() else (int(value.min()), int(value.max()))
    name, args = op_name(node), node.args
    if node.target is operator.getitem and op_name(args[0]) in _PAIRS and args[1] == 1:  # type: ignore[arg-type]
        return _positions(args[0])  # type: ignore[arg-type]
    if name in _INDICES:
        return _positions(node)
    parts = _parts(name, args)
    if parts is not None:
        return _union([_of(part, depth, given) for part in parts])
    if name in ("remainder", "fmod", "clamp"):
        return _limited(name, args)
    if name in ("slice_scatter", "masked_scatter", "copy", "constant_pad_nd", "repeat_interleave"):
        return None
    if name in _CASTS or moves_rows(node):
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        return None if source is None or _float(source) else bounds(source, depth - 1, given)
    return None


def _limited(name: str, args: Sequence[PyObject]) -> IdBounds:
    """Of an op that limits its values by its own numbers."""
    if name != "clamp":
        n = args[1]
        return ((0 if name == "remainder" else 1 - n), n - 1) if isinstance(n, int) and n > 0 else None
    low, high = (args[1] if len(args) > 1 else None), (args[2] if len(args) > 2 else None)
    return (low, high) if isinstance(low, int) and isinstance(high, int) else None


def _parts(name: str, args: Sequence[PyObject]) -> Sequence[PyObject] | None:
    """The arguments of which each entry of an op's result is one; None for an op that computes its entries."""
    if name in _FILLS and len(args) > _FILLS[name]:
        return [args[_FILLS[name]]]
    if name in ("zeros", "zeros_like", "new_zeros"):
        return [0]
    if name in ("ones", "ones_like", "new_ones"):
        return [1]
    if name == "where":
        return args[1:]
    if name in ("cat", "stack"):
        return list(args[0])
    places = {"masked_fill": 2, "scatter": 3, "index_put": 2}
    return [args[0], args[places[name]]] if name in places else None


def _float(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


def _of(value: PyObject, depth: int, given: Mapping[fx.Node, IdBounds]) -> IdBounds:
    if isinstance(value, fx.Node):
        return None if _float(value) else bounds(value, depth - 1, given)
    return (int(value), int(value)) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _union(parts: list[IdBounds]) -> IdBounds:
    known = [p for p in parts if p is not None]
    return (min(p[0] for p in known), max(p[1] for p in known)) if len(known) == len(parts) and known else None


def _positions(node: fx.Node) -> IdBounds:
    """Of an op that answers with positions along an axis of its first argument."""
    source, name = node.args[0], op_name(node)
    shape = source.meta.get("shape") if isinstance(source, fx.Node) else None
    if not shape:
        return None
    place = 2 if name in ("topk", "kthvalue") else 1
    whole = None if name in ("argmax", "argmin") else -1
    axis = node.args[place] if len(node.args) > place else node.kwargs.get("dim", whole)
    if name == "multinomial":
        axis = -1
    if axis is None:
        return 0, math.prod(shape) - 1
    return (0, shape[axis] - 1) if isinstance(axis, int) else None
