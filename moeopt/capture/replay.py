"""Run a part of a tape again with some of its values replaced.

Because the tape is functional, ``replay`` is ordinary interpretation: nodes that depend on a replaced
value are executed, all others keep what they held. Three questions are answered this way: what does
the function between two matmuls compute (float64, random values), which rows does data movement carry
where (int64 row labels), and by what does each expert's row enter the sum (one-hot codes).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_pointwise, moves_rows, op_name
from moeopt.capture.tape import Tape
from moeopt.value_types import FxArg, PyObject

aten = torch.ops.aten
CONFLICT, UNTRACKED = -2, -1


def descendants(tape: Tape, sources: Iterable[fx.Node], until: int | None = None) -> list[fx.Node]:
    """Recorded nodes that depend on any of ``sources`` (themselves excluded), in order, up to index ``until``."""
    seen = set(sources)
    start = min(n.meta["index"] for n in seen)
    stop = len(tape.nodes) if until is None else until + 1
    out = []
    for node in tape.nodes[start:stop]:
        if node not in seen and any(a in seen for a in node.all_input_nodes):
            seen.add(node)
            out.append(node)
    return out


def ancestors(targets: Iterable[fx.Node], ends: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Every node that any of ``targets`` depends on, themselves included, by ways that pass none of ``ends``."""
    seen: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(() if node in ends else node.all_input_nodes)
    return seen


def between(tape: Tape, sources: Iterable[fx.Node], target: fx.Node) -> list[fx.Node]:
    """Nodes on a path from ``sources`` to ``target`` (target included, sources not), in order."""
    reach = ancestors([target])
    return [n for n in descendants(tape, sources, target.meta["index"]) if n in reach]


def only_ways_out(tape: Tape, sources: Iterable[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """Those of ``nodes`` and ``sources`` through which every path leads from a source to the tape's results.

    The paths of a graph without cycles are counted: those to a node times those from there are as many as there are
    paths in all where every path passes the node. One look at each node then serves for all of them.

    Args:
        nodes: what depends on a source, in order.
    """
    starts, ends = set(sources), set(tape.results())
    order = sorted(starts.union(nodes), key=lambda n: n.meta["index"])
    to, onwards = dict.fromkeys(order, 0), {n: int(n in ends) for n in order}
    for node in order:
        to[node] = 1 if node in starts else sum(to.get(a, 0) for a in node.all_input_nodes)
    for node in reversed(order):
        for a in node.all_input_nodes:
            if a in onwards and node not in starts:  # a path begins at the last source on it
                onwards[a] += onwards[node]
    paths = sum(onwards[n] for n in starts)
    return {n for n in order if (not paths if n in starts else to[n] * onwards[n] == paths)}


def replay(
    tape: Tape,
    nodes: list[fx.Node],
    given: dict[fx.Node, Any],
    dtype: torch.dtype | None = None,
    only: fx.Node | None = None,
) -> dict[fx.Node, Any]:
    """Execute ``nodes`` in order over ``given``; other operands come from the tape.

    Args:
        only: keep this value alone; the others are let go after their last use, out of ``given`` too.
        dtype: when set (float64), every floating operand is cast to it and casts to other floating
            dtypes on the way are ignored, so that the result has no rounding of the model's dtype.
    """
    env = given if only is not None else dict(given)
    last: dict[fx.Node, fx.Node] = {a: n for n in nodes if only is not None for a in n.all_input_nodes}

    def look(node: fx.Node) -> PyObject:
        if node in env:
            return env[node]
        return _cast(tape.value(node), dtype)

    with torch.no_grad():
        for node in nodes:
            if node in given:
                continue
            looked: FxArg = fx.map_arg((node.args, node.kwargs), look)
            args, kwargs = looked
            if dtype is not None:
                kwargs = {k: _wide(v, dtype) if k == "dtype" else v for k, v in kwargs.items()}
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for operand in node.all_input_nodes if only is not None else ():
                if last[operand] is node and operand is not only:
                    env.pop(operand, None)
            del looked, args, kwargs
    return env


def _wide(value: PyObject, dtype: torch.dtype) -> PyObject:
    return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


def _cast(value: PyObject, dtype: torch.dtype | None) -> PyObject:
    if dtype is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def row_labels(
    tape: Tape, nodes: list[fx.Node], given: dict[fx.Node, torch.Tensor], only: Collection[fx.Node] | None = None
) -> dict[fx.Node, torch.Tensor]:
    """Carry int64 row labels through ``nodes``.

    Data movement moves labels; element-wise ops keep a label where all tracked operands agree
    (``CONFLICT`` where they do not); anything else loses them (absent from the result).

    Args:
        only: keep the labels of these nodes alone; the others are let go after their last use, out of ``given`` too.
    """
    labels = dict(given) if only is None else given
    last: dict[fx.Node, fx.Node] = {a: n for n in nodes if only is not None for a in n.all_input_nodes}
    for node in nodes:
        if node not in labels:
            found = _labels_of(tape, node, labels)
            if found is not None:
                labels[node] = found
        for operand in node.all_input_nodes:
            if last.get(operand) is node and operand not in only:  # type: ignore[operator]
                labels.pop(operand, None)
    return labels


def _labels_of(tape: Tape, node: fx.Node, labels: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    tracked = [a for a in node.all_input_nodes if a in labels]
    if not tracked:
        return None
    if moves_rows(node):
        moved: torch.Tensor | None = _move(tape, node, labels)
        return moved
    if is_pointwise(node):
        return _merge([labels[a] for a in tracked], node.meta["shape"])
    if op_name(node) in _ROW_WISE and labels[tracked[0]].shape == node.meta.get("shape", None):
        return labels[tracked[0]]
    return None


_ROW_WISE = {"native_layer_norm", "rms_norm", "_fused_rms_norm", "softmax", "_softmax", "layer_norm"}


def _merge(parts: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    first, *rest = (p.expand(shape) for p in parts)
    out = first
    for other in rest:
        both = (out >= 0) & (other >= 0) & (out != other)
        out = torch.where(both, CONFLICT, torch.maximum(out, other))
    return out


def _move(tape: Tape, node: fx.Node, labels: dict[fx.Node, torch.Tensor]) -> PyObject:
    def look(a: fx.Node) -> PyObject:
        if a in labels:
            return labels[a]
        value = tape.value(a)
        index_like = isinstance(value, torch.Tensor) and not value.is_floating_point()
        if index_like or not isinstance(value, torch.Tensor):
            return value
        return torch.full(value.shape, UNTRACKED, dtype=torch.long)

    looked: FxArg = fx.map_arg((node.args, node.kwargs), look)
    args, kwargs = looked
    name = op_name(node)
    if node.target is operator.getitem:
        return args[0][args[1]]
    if name in ("_to_copy", "clone", "detach", "alias", "contiguous", "lift_fresh"):
        return args[0]
    if name == "constant_pad_nd":
        return aten.constant_pad_nd.default(args[0], args[1], UNTRACKED)
    if name in ("scatter",) and not isinstance(args[3], torch.Tensor):
        return aten.scatter.value(args[0], args[1], args[2], UNTRACKED)
    if name == "index_put" and len(args) > 3 and args[3]:
        return None
    if name == "index_put" and isinstance(args[2], torch.Tensor):
        args = (args[0], args[1], args[2].to(args[0].dtype))
    if name in ("view", "_unsafe_view") and not isinstance(args[1], torch.dtype):  # labels lie in memory as they come
        return args[0].reshape(args[1])
    return node.target(*args, **kwargs)  # type: ignore[operator]
