"""A graph for any number of rows while it is written: its calls, its slots of weights, and what each node has become.

Legend: M rows, L leading dimensions on the tape, F dimensions of a row's features.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.row_function import Value
from moeopt.ir.weight_refs import PartRef
from moeopt.recognise.weight_source import part_ref
from moeopt.value_types import FxTarget, PyObject


class HeldSlots:
    """A value of the graph. ``lead``: L leading sizes on the tape, None for a value made of weights alone.

    ``shape``: on the tape for rows, features last, in the graph for weights. ``items``: of several results, those
    known. ``axis``: the dimension on the tape in which the features stand; -1 where they are the last. ``front``: how
    many of the features' dimensions stand before the rows on the tape (``shape`` has the rows first).
    """

    def __init__(
        self, number: int, lead: tuple[int, ...] | None, shape: tuple[int, ...], items: list[HeldSlots] | None = None,
        axis: int = -1,
    ) -> None:  # fmt: skip
        self.number, self.lead, self.shape, self.items = Value(number), lead, shape, items
        self.axis, self.front = axis, 0

    @property
    def features(self) -> tuple[int, ...]:
        return self.shape if self.lead is None else self.shape[len(self.lead) :]


class NoRowFunction(Declined):
    """A call that is no function of each row by itself, or has no rule."""

    made_rows = False
    """Whether a tensor had been read as one with a row for each of the expert's."""


class RowGraphWriter:
    """The calls written so far; ``row_graph`` walks the tape with it, and the rules of ``row_graph_rules`` add calls.

    Attributes:
        slots: the weights of this expert, in the order of the graph's slots.
        nodes: (op, args, kwargs) of each call, operands as ``Value`` numbers.
        known: what each node of the tape is in the graph.
        lead: the leading sizes of the rows themselves.
        rows_made: see ``row_graph_made``; ``made_rows``: whether there was such a tensor.
    """

    def __init__(self, tape: Tape, cone: set[fx.Node], values: bool) -> None:
        self.tape, self.cone, self.values = tape, cone, values
        self._refs: dict[fx.Node, PartRef | None] = {}
        self.slots: list[PartRef] = []
        self.nodes: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.known: dict[fx.Node, HeldSlots] = {}
        self.lead: tuple[int, ...] = ()
        self.rows_made, self.made_rows = True, False

    def as_linear(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
        """(rows, W, bias) where ``node`` is x W^T with W as it is stored: one call instead of two, as in the module."""
        name, args = op_name(node), list[Any](node.args)
        if name not in ("mm", "addmm") or node.kwargs:
            return None
        bias, left, right = args[:3] if name == "addmm" else (None, *args[:2])
        if not isinstance(right, fx.Node) or op_name(right) not in ("t", "transpose"):
            return None
        source = right.args[0]
        if len(right.meta["shape"]) != 2 or not isinstance(source, fx.Node) or self.weight_of(source) is None:
            return None
        if bias is not None and (len(bias.meta["shape"]) != 1 or self.weight_of(bias) is None):
            return None
        return left, source, bias

    def weight_of(self, node: fx.Node) -> PartRef | None:
        if node not in self._refs:
            self._refs[node] = (
                part_ref(self.tape, node, self.values) if node not in self.cone or node.op == "get_attr" else None
            )
        return self._refs[node]

    def add(
        self, node: fx.Node, op: FxTarget, lead: tuple[int, ...] | None, *args: PyObject, **kwargs: PyObject
    ) -> HeldSlots:
        self.nodes.append((op, args, kwargs))
        shape = tuple(node.meta.get("shape") or ())
        return HeldSlots(len(self.slots) + len(self.nodes), lead, shape)

    def words(self, tree: PyObject) -> PyObject:
        if isinstance(tree, fx.Node):
            return self.known[tree].number
        return [self.words(a) for a in tree] if isinstance(tree, (list, tuple)) else tree

    def kwargs(self, node: fx.Node) -> dict[str, Any]:
        left_out = ("device", "layout", "pin_memory", "non_blocking", "memory_format")
        return {k: self.words(v) for k, v in node.kwargs.items() if k not in left_out and v is not None}

    def feature_dim(self, node: fx.Node, held: HeldSlots, dim: PyObject, extra: int = 0) -> int:
        """``dim`` counted from the right; ``extra`` for a dimension that the op adds."""
        rank = len(held.shape) + extra
        place = int(dim) % rank
        if place < len(held.lead or ()):
            raise self.refused(node, "works across rows")
        return place - rank

    def refused(self, node: fx.Node, why: str) -> Declined:
        refused = NoRowFunction(f"an expert's {op_name(node)} {why}", node.meta.get("source"))
        refused.made_rows = self.made_rows
        return refused
