"""The first of sorted values, in a traced graph, as a choice of so many: no runtime has to sort the others.

    sort(x)[:k]  ->  topk(x, k)

As they are translated, both put equal values in their order and a NaN above all, so both choose the same.
"""

from __future__ import annotations

import operator
import sys

import torch
from torch import fx

from moeopt.lower.onnx.graph_calls import call
from moeopt.value_types import PyObject

aten = torch.ops.aten


def choose_the_top(graph: fx.Graph) -> None:
    """Change ``graph`` in place."""
    for node in list(graph.nodes):
        if node.target in (aten.sort.default, aten.sort.stable):
            _choose(graph, node)


def _choose(graph: fx.Graph, node: PyObject) -> None:
    names = ("self", "dim", "descending") if node.target is aten.sort.default else ("self",)
    given: dict[str, PyObject] = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, dim, largest = given["self"], given.get("dim", -1), bool(given.get("descending", False))
    size = x.meta["val"].shape[dim] if x.meta["val"].dim() else 0
    paths = [_to_cut(user) for part in node.users for user in part.users]
    many = {_first(path[-1], dim, x.meta["val"].dim()) for path in paths}
    k = many.pop() if len(many) == 1 else None
    if k is None or not isinstance(size, int) or k > size or len(paths) > len({path[0].args[0] for path in paths}):
        return
    with graph.inserting_before(node):
        chosen = call(graph, aten.topk.default, x, k, dim, largest, True)
        both = [call(graph, operator.getitem, chosen, number) for number in (0, 1)]
    for path in paths:
        new, cut = both[path[0].args[0].args[1]], path[-1]
        cut.replace_all_uses_with(new)
        for step in reversed(path):
            graph.erase_node(step)
        new.name = cut.name  # the program's signature knows its results by name
    for part in list(node.users):
        graph.erase_node(part)
    graph.erase_node(node)
    for unread in both:
        if not unread.users:
            graph.erase_node(unread)


def _to_cut(user: PyObject) -> list[PyObject]:
    """A reader of what was sorted, behind slices that take all of it: ``y[:, :k]`` has one, of its rows."""
    path = [user]
    while (given := _slice(path[-1])) is not None and given[2:] == (0, None, 1) and len(path[-1].users) == 1:
        path.extend(path[-1].users)
    return path


def _slice(node: PyObject) -> tuple[PyObject, ...] | None:
    """(x, axis, start, end, step) of a slice, its end None where that is the end of what is cut; None of others."""
    if node.target is not aten.slice.Tensor or node.kwargs:
        return None
    x, axis, start, end, step = tuple(node.args) + (0, None, None, 1)[len(node.args) - 1 :]
    return x, axis, start or 0, None if end == sys.maxsize else end, step


def _first(cut: PyObject, dim: int, rank: int) -> int | None:
    """How many of the first along ``dim`` a node takes; None where it does something else."""
    given = _slice(cut)
    if given is None:
        return None
    _, axis, start, end, step = given
    plain = axis % rank == dim % rank and isinstance(start, int) and start == 0 and step == 1
    return end if plain and isinstance(end, int) and end > 0 else None
