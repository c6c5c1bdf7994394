"""The calls between a rows tensor and an expert's output as a graph for any number of rows; or why they are not one.

Walking the calls proves that each works on every row by itself: a value is either ``RowCount`` (its leading dimensions
``lead`` count rows, the rest are a row's features) or made of weights alone. Each op has a rule that says what it may
do with the features; one that would touch the rows, or that has no rule, ends the walk. In the graph all rows stand in
one leading dimension, features are named from the right, and a weight is a slot.

Legend: M rows, L leading dimensions on the tape, F dimensions of a row's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_factory, is_pointwise, op_name
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.row_function import GETITEM, RowCount, Value, write_body
from moeopt.ir.weight_refs import PartRef
from moeopt.recognise.weight_source import part_ref
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten
MOST = 400
"""Calls of one expert that are looked at."""
_SAME = ("clone", "detach", "alias", "contiguous", "lift_fresh", "lift_fresh_copy")
_REDUCTIONS = ("sum", "mean", "var", "std", "amax", "amin", "logsumexp", "linalg_vector_norm", "prod", "norm")
_ALONG = ("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "glu", "flip")
_NORMS = ("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
_BATCH_NORMS = ("_native_batch_norm_legit_no_training", "native_batch_norm", "_batch_norm_no_update")


class HeldSlots:
    """A value of the graph. ``lead``: L leading sizes on the tape, None for a value made of weights alone.

    ``shape``: on the tape for rows, in the graph for weights. ``items``: of several results, those known.
    """

    def __init__(
        self, number: int, lead: tuple[int, ...] | None, shape: tuple[int, ...], items: list[HeldSlots] | None = None
    ) -> None:
        self.number, self.lead, self.shape, self.items = Value(number), lead, shape, items

    @property
    def features(self) -> tuple[int, ...]:
        return self.shape if self.lead is None else self.shape[len(self.lead) :]


class RowGraphReader:
    """The graph from ``start`` (the rows, features last) to ``end``, written as it is walked.

    Attributes:
        text: see :mod:`moeopt.ir.row_function`.
        slots: what this expert has in them.

    Raises:
        Declined: a call is no function of each row by itself, or has no rule; the text names it.
    """

    def __init__(self, tape: Tape, start: fx.Node, end: fx.Node, cone: set[fx.Node], values: bool = True) -> None:
        self.tape, self.cone, self._values = tape, cone, values
        self._refs: dict[fx.Node, PartRef | None] = {}
        self.slots: list[PartRef] = []
        self.nodes: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._dtypes: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self._known: dict[fx.Node, HeldSlots] = {}
        self._slot_of: dict[PartRef, HeldSlots] = {}
        shape = start.meta["shape"]
        self.lead = tuple(shape[:-1])
        if not self.lead or math.prod(self.lead) == 0:
            raise Declined("no token reached one of its experts", start.meta.get("source"))
        self._known[start] = HeldSlots(0, self.lead, tuple(shape))
        order = self._order(end)
        for node in order:  # slots come first, so their numbers are known only now
            if (ref := self._weight_of(node)) is not None and ref not in self._slot_of:
                if not node.meta["dtype"].is_floating_point:
                    raise self._refused(node, "is computed from a weight of integers")
                self._slot_of[ref] = HeldSlots(len(self.slots) + 1, None, ref.shape)
                self.slots.append(ref)
                self._dtypes.append((node.meta["dtype"], ref.shape))
        for node in order:
            self._known[node] = self._enter(node)
        result = self._known[end]
        if result.lead is None or len(result.features) != 1 or math.prod(result.lead) != math.prod(self.lead):
            raise Declined("an expert's output is not one vector for each of its rows", end.meta.get("source"))
        self.out_features = result.features[0]
        self.text = write_body(
            shape[-1], start.meta["dtype"], self._dtypes, self.nodes, int(result.number), self.out_features
        )

    def _order(self, end: fx.Node) -> list[fx.Node]:
        """The nodes that ``end`` is made of, each after what it reads; the same order for every expert."""
        done: dict[fx.Node, None] = {}
        stack = [end]
        while stack:
            node = stack[-1]
            if node in done or node in self._known:
                stack.pop()
                continue
            inputs = [] if self._weight_of(node) is not None else self._inputs(node)
            missing = [a for a in inputs if a not in done and a not in self._known]
            if missing:
                stack.extend(reversed(missing))
            else:
                done[node] = None
                stack.pop()
            if len(done) + len(stack) > MOST:
                raise Declined(f"an expert is more than {MOST} calls", end.meta.get("source"))
        return list(done)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        linear = self.as_linear(node)
        return node.all_input_nodes if linear is None else [a for a in linear if a is not None]

    def as_linear(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
        """(rows, W, bias) where ``node`` is x W^T with W as it is stored: one call instead of two, as in the module."""
        name, args = op_name(node), list[Any](node.args)
        if name not in ("mm", "addmm") or node.kwargs:
            return None
        bias, left, right = args[:3] if name == "addmm" else (None, *args[:2])
        if not isinstance(right, fx.Node) or op_name(right) not in ("t", "transpose"):
            return None
        source = right.args[0]
        if len(right.meta["shape"]) != 2 or not isinstance(source, fx.Node) or self._weight_of(source) is None:
            return None
        if bias is not None and (len(bias.meta["shape"]) != 1 or self._weight_of(bias) is None):
            return None
        return left, source, bias

    def _weight_of(self, node: fx.Node) -> PartRef | None:
        if node not in self._refs:
            self._refs[node] = (
                part_ref(self.tape, node, self._values) if node not in self.cone or node.op == "get_attr" else None
            )
        return self._refs[node]

    # -- one node ------------------------------------------------------------------------------------

    def _enter(self, node: fx.Node) -> HeldSlots:
        ref = self._weight_of(node)
        if ref is not None:
            return self._slot_of[ref]
        if node.op == "get_attr":
            return self._constant(node)
        if node.op != "call_function":
            raise self._refused(node, "reads another input of the block beside its rows")
        inputs = [self._known[a] for a in self._inputs(node)]
        if not any(h.lead is not None for h in inputs):
            return self._of_weights(node)
        name = op_name(node)
        if name in _SAME:
            return inputs[0]
        if name == "_to_copy":
            return self._add(node, aten._to_copy.default, inputs[0].lead, inputs[0].number, dtype=node.meta["dtype"])
        if is_pointwise(node) and name != "glu":
            return self._pointwise(node)
        rule = _RULES.get(name)
        if rule is None:
            raise self._refused(node, "is not known to work on each row by itself")
        return rule(self, node, self._known[node.all_input_nodes[0]])

    def _add(
        self, node: fx.Node, op: FxTarget, lead: tuple[int, ...] | None, *args: PyObject, **kwargs: PyObject
    ) -> HeldSlots:
        self.nodes.append((op, args, kwargs))
        shape = tuple(node.meta.get("shape") or ())
        return HeldSlots(len(self.slots) + len(self.nodes), lead, shape)

    def _constant(self, node: fx.Node) -> HeldSlots:
        if node.meta["shape"] != () or not self._values:
            raise self._refused(node, "is a tensor that Python made at this call")
        value = self.tape.value(node)
        return self._add(node, aten.scalar_tensor.default, None, value.item(), dtype=value.dtype)

    def _of_weights(self, node: fx.Node) -> HeldSlots:
        """A call on weights and numbers alone: as it is, where its sizes cannot be the number of rows."""
        name = op_name(node)
        if is_factory(node) and (node.meta.get("shape") or ()) != ():
            raise self._refused(node, "makes a tensor of a size that may be the number of rows")
        if name == "expand" and math.prod(node.meta["shape"]) != math.prod(self._known[node.all_input_nodes[0]].shape):
            return self._known[node.all_input_nodes[0]]  # what reads it broadcasts
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise self._refused(node, "draws random numbers")
        if node.meta.get("shape") is None:
            held = self._add(node, node.target, None, *self._words(node.args), **self._kwargs(node))
            held.items = []
            return held
        if name == "getitem":
            return self._add(node, GETITEM, None, *self._words(node.args))
        return self._add(node, node.target, None, *self._words(node.args), **self._kwargs(node))

    def _words(self, tree: PyObject) -> PyObject:
        if isinstance(tree, fx.Node):
            return self._known[tree].number
        return [self._words(a) for a in tree] if isinstance(tree, (list, tuple)) else tree

    def _kwargs(self, node: fx.Node) -> dict[str, Any]:
        left_out = ("device", "layout", "pin_memory", "non_blocking", "memory_format")
        return {k: self._words(v) for k, v in node.kwargs.items() if k not in left_out and v is not None}

    def _pointwise(self, node: fx.Node) -> HeldSlots:
        """Operands broadcast from the right, so all rows must have as many features' dimensions."""
        rows = [h for a in node.all_input_nodes if (h := self._known[a]).lead is not None]
        width = {len(h.features) for h in rows}
        leads = {h.lead for h in rows}
        shape = tuple(node.meta["shape"])
        if len(width) > 1 or len(leads) > 1 or shape[: len(shape) - width.pop()] != rows[0].lead:
            raise self._refused(node, "meets rows that lie differently")
        (lead,) = leads
        count = len(shape) - len(lead or ())

        def word(a: PyObject) -> PyObject:
            if not isinstance(a, fx.Node):
                return a
            held = self._known[a]
            if held.lead is not None or len(held.shape) <= count:
                return held.number
            if any(size != 1 for size in held.shape[: len(held.shape) - count]):
                raise self._refused(node, "gives rows different weights by their place")
            tail = list(held.shape[len(held.shape) - count :])
            self.nodes.append((aten.reshape.default, (held.number, tail), {}))
            return Value(len(self.slots) + len(self.nodes))

        args = [word(a) for a in node.args]
        return self._add(node, node.target, lead, *args, **self._kwargs(node))

    def feature_dim(self, node: fx.Node, held: HeldSlots, dim: PyObject, extra: int = 0) -> int:
        """``dim`` counted from the right; ``extra`` for a dimension that the op adds."""
        rank = len(held.shape) + extra
        place = int(dim) % rank
        if place < len(held.lead or ()):
            raise self._refused(node, "works across rows")
        return place - rank

    def _refused(self, node: fx.Node, why: str) -> Declined:
        return Declined(f"an expert's {op_name(node)} {why}", node.meta.get("source"))


Rule = Callable[[RowGraphReader, fx.Node, HeldSlots], HeldSlots]


def _product(graph: RowGraphReader, node: fx.Node, _: HeldSlots) -> HeldSlots:
    """mm, addmm, mv, linear: rows on the left, a weight on the right."""
    name = op_name(node)
    if (linear := graph.as_linear(node)) is not None:
        x, weight, bias = (None if a is None else graph._known[a] for a in linear)
        if x is None or weight is None or x.lead is None or len(x.features) != 1:
            raise graph._refused(node, "multiplies rows with one another")
        more = () if bias is None else (bias.number,)
        return graph._add(node, aten.linear.default, x.lead, x.number, weight.number, *more)
    left, right = node.args[1:3] if name in ("addmm", "addmv") else node.args[:2]
    rows, weight = graph._known[left], graph._known[right]  # type: ignore[index]
    if rows.lead is None or weight.lead is not None or len(rows.features) != 1:
        raise graph._refused(node, "multiplies rows with one another, or from the right")
    if name in ("addmm", "addmv"):
        bias = graph._known[node.args[0]]  # type: ignore[index]
        if bias.lead is None and len(bias.shape) > 1 and bias.shape[0] != 1:
            raise graph._refused(node, "gives rows different weights by their place")
    return graph._add(node, node.target, rows.lead, *graph._words(node.args), **graph._kwargs(node))


def _view(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    rows, shape = math.prod(held.lead or ()), tuple(node.meta["shape"])
    for split in range(1, len(shape) + 1):
        if math.prod(shape[:split]) == rows and math.prod(shape[split:]) == math.prod(held.features):
            if shape[split:] == held.features:
                return HeldSlots(held.number, shape[:split], shape)
            return graph._add(node, aten.reshape.default, shape[:split], held.number, [-1, *shape[split:]])
    raise graph._refused(node, "joins features of different rows")


def _turn(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    rank, lead = len(held.shape), len(held.lead or ())
    order, given = list(range(rank)), list[Any](node.args)
    if op_name(node) == "permute":
        order = [int(d) % rank for d in given[1]]
    else:
        a, b = (0, 1) if op_name(node) == "t" else (int(given[1]) % rank, int(given[2]) % rank)
        order[a], order[b] = order[b], order[a]
    if order[:lead] != list(range(lead)):
        raise graph._refused(node, "turns rows into features")
    return graph._add(node, aten.permute.default, held.lead, held.number, [0, *(d - lead + 1 for d in order[lead:])])


def _one_dim(at: int, extra: int = 0, default: PyObject = None) -> Rule:
    """An op with one dimension among its arguments, at ``at``; it must be one of the features'."""

    def rule(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
        if op_name(node) == "slice" and node.meta["shape"] == held.shape:
            return held
        args = list(graph._words(node.args))
        dim = node.args[at] if len(node.args) > at else default
        if dim is None or (op_name(node) == "squeeze" and isinstance(dim, (list, tuple))):
            raise graph._refused(node, "works across rows")
        args[at : at + 1] = [graph.feature_dim(node, held, dim, extra)]
        found = graph._add(node, node.target, held.lead, *args, **graph._kwargs(node))
        if node.meta.get("shape") is None:  # several results
            found.items, found.shape = [], held.shape
        return found

    return rule


def _reduce(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    """The dimensions are the first list, or the second or third argument that may be one."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index("dim") if "dim" in names else -1
    dims = node.args[at] if 0 <= at < len(node.args) else node.kwargs.get("dim")
    if at < 0 or dims is None or dims == []:
        raise graph._refused(node, "works across rows")
    every = [graph.feature_dim(node, held, d) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    args, kwargs = list(graph._words(node.args)), graph._kwargs(node)
    settled: Any = every if isinstance(dims, (list, tuple)) else every[0]
    if at < len(args):
        args[at] = settled
    else:
        kwargs["dim"] = settled
    return graph._add(node, node.target, held.lead, *args, **kwargs)


def _norm(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    if len(node.args[1]) > len(held.features):  # type: ignore[arg-type]
        raise graph._refused(node, "works across rows")
    found = graph._add(node, node.target, held.lead, *graph._words(node.args), **graph._kwargs(node))
    if node.meta.get("shape") is None:
        found.items, found.shape = [found], held.shape
    return found


def _batch_norm(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    training = op_name(node) == "native_batch_norm" and bool(node.args[5])
    if training or len(held.lead or ()) != 1 or not held.features:
        raise graph._refused(node, "takes statistics of the batch, so a row's result depends on other rows")
    found = graph._add(node, node.target, held.lead, *graph._words(node.args), **graph._kwargs(node))
    found.items, found.shape = [found], held.shape
    return found


def _group_norm(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    if len(held.lead or ()) != 1 or node.args[3] != held.shape[0]:
        raise graph._refused(node, "works across rows")
    args = list(graph._words(node.args))
    args[3] = RowCount()
    found = graph._add(node, node.target, held.lead, *args)
    found.items, found.shape = [found], held.shape
    return found


def _item(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    given = list[Any](node.args)
    name, which = op_name(given[0]), int(given[1])
    if (name in _NORMS or name in _BATCH_NORMS or name == "native_group_norm") and which:
        raise graph._refused(node, "reads a statistic of a norm")
    return graph._add(node, GETITEM, held.lead, held.number, which)


def _expand(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    lead, shape = held.lead or (), tuple(node.meta["shape"])
    if len(shape) != len(held.shape) or shape[: len(lead)] != lead:
        raise graph._refused(node, "repeats rows")
    return graph._add(node, aten.expand.default, held.lead, held.number, [-1, *shape[len(lead) :]])


def _join(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    parts = [graph._known[a] for a in node.args[0]]  # type: ignore[union-attr,index]
    if len({p.lead for p in parts}) > 1 or held.lead is None:
        raise graph._refused(node, "joins rows with weights")
    dim = graph.feature_dim(node, held, node.args[1] if len(node.args) > 1 else 0, op_name(node) == "stack")
    return graph._add(node, node.target, held.lead, [p.number for p in parts], dim)


def _like(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    return graph._add(node, node.target, held.lead, *graph._words(node.args), **graph._kwargs(node))


def _flip(graph: RowGraphReader, node: fx.Node, held: HeldSlots) -> HeldSlots:
    dims = [graph.feature_dim(node, held, d) for d in node.args[1]]  # type: ignore[union-attr]
    return graph._add(node, node.target, held.lead, held.number, dims)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "addmm", "mv", "addmv", "linear"), _product),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "_reshape_alias"), _view),
    **dict.fromkeys(("t", "transpose", "permute"), _turn),
    **dict.fromkeys(_ALONG, _one_dim(1, default=-1)),
    **dict.fromkeys(("select", "slice", "unbind"), _one_dim(1, default=0)),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _one_dim(2, default=0)),
    "squeeze": _one_dim(1),
    "unsqueeze": _one_dim(1, extra=1),
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
