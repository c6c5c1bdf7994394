"""Tensors that an expert's code makes at each call: of fixed sizes, or with one row for each of the expert's rows.

    torch.arange(4), torch.eye(H), torch.tensor([1, 2, 4])     the same at every call: numbers in the graph
    torch.zeros(len(x), H), x.new_full((len(x), H), 2.0)       as many rows as there are; what they hold is written out
    scale.expand(len(x), -1), first.repeat(len(x), 1, 1)       a weight repeated for each row

A number on the tape does not say whether it is the number of rows. Of one reading ``rows_made`` all that could be are,
of the other none; other experts and other calls have other numbers of rows, and must give the same graph. Everything is
made of the rows' own tensor, so that it lies on their device.

Legend: M rows, L leading dimensions on the tape.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_factory, op_name
from moeopt.ir.row_function import RowCount, Value
from moeopt.recognise.row_graph_writer import HeldSlots, RowGraphWriter
from moeopt.value_types import PyObject

aten = torch.ops.aten
MOST_NUMBERS = 64
"""Numbers of a tensor that Python made which are written into the graph."""
_FILLS = {"zeros": 0, "new_zeros": 0, "zeros_like": 0, "ones": 1, "new_ones": 1, "ones_like": 1, "empty": 0,
          "new_empty": 0, "empty_like": 0, "full": None, "new_full": None, "full_like": None}  # fmt: skip
"""What each factory writes; None where it is told. Nobody reads what an empty one holds before it is written."""
_LIKE = ("zeros_like", "ones_like", "empty_like", "full_like")


def made_tensor(graph: RowGraphWriter, node: fx.Node) -> HeldSlots | None:
    """What a factory, or a weight that is repeated for each row, becomes; None for other calls."""
    name, shape = op_name(node), tuple(node.meta.get("shape") or ())
    of_rows = graph.rows_made and has_rows(graph, node)
    graph.made_rows |= of_rows
    if of_rows and name in ("expand", "repeat"):
        return _repeated(graph, node, shape)
    if not is_factory(node) or shape == () or name in _LIKE:
        return None
    if name in _FILLS:
        sizes = [RowCount(), *shape[len(graph.lead) :]] if of_rows else list(shape)
        lead = graph.lead if of_rows else None
        return _filled(graph, node, lead, sizes, _fill_of(node, name))
    if name == "arange" and not node.meta["dtype"].is_floating_point:
        return _counted(graph, node)
    if name == "eye" and shape[0] == shape[-1]:
        ones = _filled(graph, node, None, [shape[0]], 1)
        return graph.add(node, aten.diag_embed.default, None, ones.number)
    return numbers(graph, node)


def numbers(graph: RowGraphWriter, node: fx.Node) -> HeldSlots:
    """The values of a small tensor that is no weight, one by one; what depends on the input is no such tensor.

    Raises:
        Declined: they are too many, or were not recorded.
    """
    shape = tuple(node.meta["shape"])
    if not graph.values or not 0 < math.prod(shape) <= MOST_NUMBERS:
        raise graph.refused(
            node, f"is a tensor of more than {MOST_NUMBERS} numbers that Python made at this call; keep it as a buffer"
        )
    parts = [_filled(graph, node, None, [1], value).number for value in graph.tape.value(node).flatten().tolist()]
    joined = graph.add(node, aten.cat.default, None, parts, 0)
    return joined if len(shape) == 1 else graph.add(node, aten.reshape.default, None, joined.number, list(shape))


def has_rows(graph: RowGraphWriter, node: fx.Node) -> bool:
    """Whether ``node`` has as many rows as there are, and features."""
    shape = tuple(node.meta.get("shape") or ())
    return len(shape) > len(graph.lead) and shape[: len(graph.lead)] == graph.lead


def _fill_of(node: fx.Node, name: str) -> PyObject:
    """What the factory writes; of ``full`` its second or third argument."""
    told = _FILLS[name]
    return node.args[2 if name == "new_full" else 1] if told is None else told


def _filled(
    graph: RowGraphWriter, node: fx.Node, lead: tuple[int, ...] | None, sizes: PyObject, value: PyObject
) -> HeldSlots:
    if isinstance(value, fx.Node):
        raise graph.refused(node, "writes a value that is computed into a tensor of this call")
    made = graph.add(node, aten.new_full.default, lead, Value(0), sizes, value, dtype=node.meta["dtype"])
    if lead is None:
        made.shape = tuple(sizes)
    return made


def _counted(graph: RowGraphWriter, node: fx.Node) -> HeldSlots:
    """Integers in equal steps, as a running sum."""
    (count,) = node.meta["shape"]
    name = str(node.target)
    given = list[Any](node.args)
    start, step = (given[0] if name != "aten.arange.default" else 0), (given[2] if len(given) > 2 else 1)
    ones = _filled(graph, node, None, [count], step)
    sums = graph.add(node, aten.cumsum.default, None, ones.number, 0, dtype=node.meta["dtype"])
    return graph.add(node, aten.add.Tensor, None, sums.number, start - step)


def _repeated(graph: RowGraphWriter, node: fx.Node, shape: tuple[int, ...]) -> HeldSlots | None:
    """A weight of one row, for each row; None where it has several rows of its own."""
    weight, lead = graph.known[node.all_input_nodes[0]], len(graph.lead)
    whole = (1,) * (len(shape) - len(weight.shape)) + weight.shape
    if any(size != 1 for size in whole[:lead]):
        return None
    row = graph.add(node, aten.reshape.default, None, weight.number, [1, *whole[lead:]])
    if op_name(node) == "expand":
        return graph.add(node, aten.expand.default, graph.lead, row.number, [RowCount(), *shape[lead:]])
    times = list[Any](node.args[1])  # type: ignore[arg-type]
    return graph.add(node, aten.repeat.default, graph.lead, row.number, [RowCount(), *times[lead:]])
