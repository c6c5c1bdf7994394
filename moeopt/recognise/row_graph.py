"""The calls between a rows tensor and an expert's output as a graph for any number of rows; or why they are not one.

Walking the calls proves that each works on every row by itself: a value is either rows (its leading dimensions
``lead`` count rows, the rest are a row's features) or made of weights alone. Each op has a rule (``row_graph_rules``)
that says what it may do with the features; one that would touch the rows, or that has no rule, ends the walk. In the
graph all rows stand in one leading dimension, features are named from the right, and a weight is a slot.

Legend: M rows, L leading dimensions on the tape, F dimensions of a row's features.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from moeopt.capture.op_kinds import is_pointwise, op_name
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.row_function import CODES, GETITEM, PLACES, Value, write_body
from moeopt.ir.weight_refs import PartRef
from moeopt.recognise.row_graph_blocks import block_rule
from moeopt.recognise.row_graph_channels import LAST, channel_rule, rows_last
from moeopt.recognise.row_graph_made import has_rows, made_tensor, numbers
from moeopt.recognise.row_graph_rules import RULES
from moeopt.recognise.row_graph_writer import HeldSlots, RowGraphWriter
from moeopt.value_types import PyObject

aten = torch.ops.aten
MOST = 400
"""Calls of one expert that are looked at."""
_WAY_OUT = {
    "convolution": " together with what is around it; write 1x1 convolutions as nn.Linear, and put channels last",
}
"""What more there is to say of ops without a rule."""
_SAME = ("clone", "detach", "alias", "contiguous", "lift_fresh", "lift_fresh_copy")


class RowGraphReader(RowGraphWriter):
    """The graph from ``start``, the rows, to ``end``, written as it is walked.

    With rows ``beside``, a row of the graph is one of each, side by side.

    Args:
        axis: the dimension of ``start`` in which the features stand.
        same: calls that give what ``start`` gives.
        rows_made: tensors that the code makes with as many rows as ``start`` has are of these rows; else none are.

    Attributes:
        text: see :mod:`moeopt.ir.row_function`.
        slots: what this expert has in them.
        out_axis: the dimension of ``end`` in which the features stand.

    Raises:
        Declined: a call is no function of each row by itself, or has no rule; the text names it.
    """

    def __init__(
        self, tape: Tape, start: fx.Node, end: fx.Node, cone: set[fx.Node], values: bool = True,
        beside: tuple[fx.Node, ...] = (), axis: int = LAST, same: tuple[fx.Node, ...] = (), rows_made: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(tape, cone, values)
        self.rows_made = rows_made
        self._dtypes: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self._slot_of: dict[PartRef, HeldSlots] = {}
        shape = rows_last(tuple(start.meta["shape"]), axis)
        self.lead = shape[:-1]
        if not self.lead or math.prod(self.lead) == 0:
            raise Declined("no token reached one of its experts", start.meta.get("source"))
        for node in (start, *same, *beside):
            self.known[node] = HeldSlots(0, self.lead, rows_last(tuple(node.meta["shape"]), axis), axis=axis)
        order = self._order(end)
        for node in order:  # slots come first, so their numbers are known only now
            if (ref := self.weight_of(node)) is not None and ref not in self._slot_of:
                if not node.meta["dtype"].is_floating_point and node.meta["dtype"] not in CODES + PLACES:
                    raise self.refused(node, "is computed from a weight of integers")
                self._slot_of[ref] = HeldSlots(len(self.slots) + 1, None, ref.shape)
                self.slots.append(ref)
                self._dtypes.append((node.meta["dtype"], ref.shape))
        features = self._apart((start, *beside)) if beside else shape[-1]
        for node in order:
            self.known[node] = self._enter(node)
        result = self.known[end]
        if (
            result.lead is None
            or result.front
            or len(result.features) != 1
            or math.prod(result.lead) != math.prod(self.lead)
        ):
            raise Declined("an expert's output is not one vector for each of its rows", end.meta.get("source"))
        self.out_features, self.out_axis = result.features[0], result.axis
        self.text = write_body(
            features, start.meta["dtype"], self._dtypes, self.nodes, int(result.number), self.out_features
        )

    def _apart(self, starts: tuple[fx.Node, ...]) -> int:
        """Take the rows apart that hold a row of each of ``starts`` side by side; how many features they have."""
        at = 0
        for node in starts:
            width = node.meta["shape"][-1]
            self.known[node] = self.add(node, aten.slice.Tensor, self.lead, Value(0), 1, at, at + width)
            at += width
        return at

    def _order(self, end: fx.Node) -> list[fx.Node]:
        """The nodes that ``end`` is made of, each after what it reads; the same order for every expert."""
        done: dict[fx.Node, None] = {}
        stack = [end]
        while stack:
            node = stack[-1]
            if node in done or node in self.known:
                stack.pop()
                continue
            inputs = [] if self.weight_of(node) is not None else self._inputs(node)
            missing = [a for a in inputs if a not in done and a not in self.known]
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

    def _enter(self, node: fx.Node) -> HeldSlots:
        ref = self.weight_of(node)
        if ref is not None:
            return self._slot_of[ref]
        if node.op == "get_attr":
            return self._constant(node)
        if node.op != "call_function":
            raise self.refused(node, "reads another input of the block beside its rows")
        inputs = [self.known[a] for a in self._inputs(node)]
        if not any(h.lead is not None for h in inputs):
            return self._of_weights(node)
        name = op_name(node)
        if name in ("new_zeros", "new_ones", "new_full", "new_empty") and (made := made_tensor(self, node)) is not None:
            return made
        if node.target is aten.view.dtype:
            raise self.refused(node, "reads the bits of its rows as another dtype")
        if (turned := block_rule(self, node) or channel_rule(self, node)) is not None:
            return turned()
        if name in _SAME:
            return inputs[0]
        if name == "_to_copy":
            return self.add(node, aten._to_copy.default, inputs[0].lead, inputs[0].number, dtype=node.meta["dtype"])
        if is_pointwise(node) and name != "glu":
            return self._pointwise(node)
        rule = RULES.get(name)
        if rule is None:
            raise self.refused(node, "is not known to work on each row by itself" + _WAY_OUT.get(name, ""))
        return rule(self, node, self.known[node.all_input_nodes[0]])

    def _constant(self, node: fx.Node) -> HeldSlots:
        if node.meta["shape"] != ():
            return numbers(self, node)
        if not self.values:
            raise self.refused(node, "is a tensor that Python made at this call")
        value = self.tape.value(node)
        return self.add(node, aten.scalar_tensor.default, None, value.item(), dtype=value.dtype)

    def _of_weights(self, node: fx.Node) -> HeldSlots:
        """A call on weights and numbers alone: as it is, where its sizes cannot be the number of rows."""
        name = op_name(node)
        if name == "expand" and self._only_broadcasts(node) and not self._is_read_as_rows(node):
            return self.known[node.all_input_nodes[0]]
        if name == "repeat" and all(op_name(user) == "native_batch_norm" and user.args[5] for user in node.users):
            return self.known[node.all_input_nodes[0]]  # the weights of an instance norm
        if (made := made_tensor(self, node)) is not None:
            return made
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise self.refused(node, "draws random numbers")
        if node.meta.get("shape") is None:
            held = self.add(node, node.target, None, *self.words(node.args), **self.kwargs(node))
            held.items = []
            return held
        if (linear := self.as_linear(node)) is not None:
            given = [self.known[a].number for a in linear if a is not None]
            return self.add(node, aten.linear.default, None, *given)
        if name == "getitem":
            return self.add(node, GETITEM, None, *self.words(node.args))
        if node.target is aten.view.dtype:
            return self._bits(node)
        if name in ("view", "_unsafe_view", "_reshape_alias"):  # here a weight may lie otherwise than on the tape
            return self.add(node, aten.reshape.default, None, *self.words(node.args[:2]))
        return self.add(node, node.target, None, *self.words(node.args), **self.kwargs(node))

    def _bits(self, node: fx.Node) -> HeldSlots:
        """Integers that are read as codes of another dtype."""
        (stored,), read = node.all_input_nodes, node.meta["dtype"]
        if stored.meta["dtype"].is_floating_point or read not in CODES:  # floats are widened for the oracle
            raise self.refused(node, f"reads the bits of a weight as {read}; hold the weight in that dtype")
        together = self.add(node, aten.contiguous.default, None, self.known[stored].number)
        return self.add(node, aten.view.dtype, None, together.number, read)

    def _only_broadcasts(self, expand: fx.Node) -> bool:
        """Whether all that read ``expand`` broadcast what it repeats, or gather by it, which has a rule for places that
        are the same for every row; a view, as of repeated scales, does not."""
        return all(
            self._only_broadcasts(user)
            if op_name(user) in _SAME
            else is_pointwise(user) or op_name(user) == "gather" or _only_adds(user, expand)
            for user in expand.users
        )

    def _is_read_as_rows(self, expand: fx.Node) -> bool:
        """Whether a weight is repeated for each row, and enters a call that reads no row: what this gives has rows."""
        return self.rows_made and has_rows(self, expand) and any(user not in self.cone for user in expand.users)

    def _pointwise(self, node: fx.Node) -> HeldSlots:
        """Operands broadcast from the right, so all rows must have as many features' dimensions."""
        rows = [h for a in node.all_input_nodes if (h := self.known[a]).lead is not None]
        width = {len(h.features) for h in rows}
        leads = {h.lead for h in rows}
        shape = tuple(node.meta["shape"])
        if len(width) > 1 or len(leads) > 1 or shape[: len(shape) - width.pop()] != rows[0].lead:
            raise self.refused(node, "meets rows that lie differently")
        (lead,) = leads
        count = len(shape) - len(lead or ())

        def word(a: PyObject) -> PyObject:
            if not isinstance(a, fx.Node):
                return a
            held = self.known[a]
            if held.lead is not None or len(held.shape) <= count:
                return held.number
            if any(size != 1 for size in held.shape[: len(held.shape) - count]):
                raise self.refused(node, "gives rows different weights by their place")
            tail = list(held.shape[len(held.shape) - count :])
            self.nodes.append((aten.reshape.default, (held.number, tail), {}))
            return Value(len(self.slots) + len(self.nodes))

        args = [word(a) for a in node.args]
        return self.add(node, node.target, lead, *args, **self.kwargs(node))


def _only_adds(product: fx.Node, bias: fx.Node) -> bool:
    """Whether a ``product`` adds ``bias`` to its result, and multiplies by something else."""
    return op_name(product) in ("addmm", "baddbmm") and product.args[0] is bias and bias not in product.args[1:]
