"""Which nodes of a call depend on which rows, and the parallel branches that may be experts."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_pointwise, moves_rows, op_name
from moeopt.capture.tape import Tape
from moeopt.recognise.kept_rows import keeps_rows
from moeopt.recognise.weight_source import element_source
from moeopt.value_types import PyObject

_VIEWS = (
    "view",
    "_unsafe_view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "expand",
    "transpose",
    "permute",
    "_to_copy",
    "clone",
    "detach",
    "alias",
    "contiguous",
)
"""Calls that move rows and select none."""


_SPLITS = ("split", "split_with_sizes", "chunk", "unbind")


MOST_EXTRA_INPUTS = 3
"""Tensors that an expert may read in addition to its rows."""

_FEATURE_INTEGERS = ("argmax", "argmin", "argsort", "sort", "topk", "bucketize", "searchsorted", "sum", "cumsum")
"""Calls whose integer results may index the features of a row."""


_SIZES_VARY = (
    "view", "reshape", "_unsafe_view", "expand", "slice", "select", "as_strided", "repeat", "split_with_sizes", "empty",
    "zeros", "new_zeros", "full", "new_empty", "constant_pad_nd", "split", "native_group_norm", "new_full", "new_ones",
    "affine_grid_generator",
)  # fmt: skip


class Flow:
    """Dependencies of each node of a tape.

    Attributes:
        from_input: the nodes that depend on the block's input.
        regions: of each such node, the regions of Parameters that it depends on, as a bit mask.
        computed_as: a hash of the calls that lead to a node, without weights and sizes; equal for parallel experts.
        consumed: paths of the Parameters that were applied to at least one row.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.from_input: set[fx.Node] = set()
        self.regions: dict[fx.Node, int] = {}
        self.computed_as: dict[fx.Node, int] = {}
        self.consumed: set[str] = set()
        self._bit_of_region: dict[Any, int] = {}
        self._keys: dict[fx.Node, frozenset[Any]] = {}
        self._made: set[fx.Node] = set()
        self._repeated: set[fx.Node] = set()
        for node in tape.nodes:
            self._add(node)

    def _add(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if node.op != "placeholder" and not any(a in self.from_input for a in inputs):
            self.computed_as[node] = self._weight_signature(node)
            return
        self.from_input.add(node)
        dtype = node.meta.get("dtype")
        integer = dtype is not None and not (dtype.is_floating_point or dtype.is_complex) and dtype != torch.bool
        if node.op == "placeholder" or (integer and not _may_index_features(node)):
            self.regions[node], self.computed_as[node] = 0, hash((node.op == "placeholder", str(dtype)))
            return
        mask = 0
        for a in inputs:
            if a in self.from_input:
                mask |= self.regions[a]
                continue
            keys = self._regions_of(a)
            if 0 not in (node.meta.get("shape") or ()):
                self.consumed.update(path for path, _ in keys)
            for key in keys:
                mask |= 1 << self._bit_of_region.setdefault(key, len(self._bit_of_region))
        self.regions[node] = mask
        is_selection = integer or dtype == torch.bool  # ids and masks of different experts are computed alike
        self.computed_as[node] = hash((False, str(dtype))) if is_selection else self._signature(node)

    def _weight_signature(self, node: fx.Node) -> int:
        """Dtype and shape: parallel experts differ in the place of a weight; what is repeated keeps its operand's."""
        given = node.all_input_nodes
        if op_name(node) in ("expand", "repeat"):
            self._repeated.add(node)
            return self.computed_as[given[0]]
        if node.op == "call_function" and self._made.issuperset(given):
            self._made.add(node)  # of sizes alone, which may be the number of rows
            return hash(("made", op_name(node), str(node.meta.get("dtype"))))
        if not self._repeated.isdisjoint(given) or not self._made.isdisjoint(given):  # as often as there are rows
            self._repeated.add(node)
            of = tuple(self.computed_as.get(a) for a in given)
            return hash(("repeated", op_name(node), str(node.meta.get("dtype")), of))
        return hash(("weight", str(node.meta.get("dtype")), node.meta.get("shape")))

    def _regions_of(self, node: fx.Node) -> frozenset[Any]:
        """(path, origin) of each region of a Parameter that a value depends on."""
        if node not in self._keys:
            shape = node.meta.get("shape") or ()
            source = element_source(self.tape, node, (0,) * len(shape)) if 0 not in shape and len(shape) else None
            single = len(node.all_input_nodes) < 2
            if source is not None and single and source[0].op == "get_attr" and "constant" not in source[0].meta:
                self._keys[node] = frozenset([(str(source[0].target), source[1])])
            elif node.op == "get_attr":
                self._keys[node] = frozenset() if "constant" in node.meta else frozenset([(str(node.target), ())])
            else:
                self._keys[node] = frozenset().union(*(self._regions_of(a) for a in node.all_input_nodes))
        return self._keys[node]

    def _signature(self, node: fx.Node) -> int:
        name = op_name(node)

        def word(a: PyObject) -> PyObject:
            if isinstance(a, fx.Node):
                return self.computed_as[a]
            return tuple(word(x) for x in a) if isinstance(a, (list, tuple)) else repr(a)

        is_split_part = name == "getitem" and op_name(node.args[0]) in _SPLITS  # type: ignore[arg-type]
        args = node.all_input_nodes if name in _SIZES_VARY or is_split_part else node.args
        return hash((name, word(args), repr(sorted(node.kwargs, key=str))))


def _may_index_features(node: fx.Node) -> bool:
    """Whether the integers of ``node`` may index a row's own features (a rank, a code) rather than rows."""
    return op_name(node) in _FEATURE_INTEGERS or moves_rows(node) or is_pointwise(node)


@dataclass
class Branch:
    """One expert on some rows: from ``start``, a rows tensor, to ``end``, through the calls ``inside``.

    ``beside``: further tensors with one row for each row of ``start``: a condition, a product that all experts share.
    ``same``: further calls that pick the rows that ``start`` picks. ``axis``: the dimension of ``start`` that holds the
    features.
    """

    start: fx.Node
    end: fx.Node
    inside: set[fx.Node]
    readers: list[fx.Node] = field(default_factory=list)
    beside: tuple[fx.Node, ...] = ()
    same: tuple[fx.Node, ...] = ()

    @property
    def axis(self) -> int:
        return features_axis(self.start, self.inside, self.readers)


def features_axis(start: fx.Node, inside: set[fx.Node], readers: Iterable[fx.Node]) -> int:
    """The features' dimension: 1 (channels) where ``start`` reaches a convolution by element-wise calls, else -1."""
    queue = list(readers)
    for node in queue:  # it grows
        if op_name(node) == "convolution":
            return 1
        norm = "batch_norm" in op_name(node) and len(start.meta["shape"]) > 2
        if is_pointwise(node) or norm or node.target is operator.getitem:
            queue += [u for u in node.users if u in inside and u not in queue]
    return -1


def parallel_values(flow: Flow) -> Iterator[list[Branch]]:
    """Sets of values that are computed alike from disjoint Parameters, the largest and latest first."""
    alike: dict[int, list[fx.Node]] = defaultdict(list)
    for node, mask in flow.regions.items():
        dtype = node.meta.get("dtype")
        if mask and dtype is not None and dtype.is_floating_point:
            alike[flow.computed_as[node]].append(node)
    sets = []
    for nodes in alike.values():
        common = -1
        for node in nodes:
            common &= flow.regions[node]
        private = {flow.regions[n] & ~common for n in nodes}
        if len(private) > 1 and 0 not in private and sum(private) == _union(private):
            sets.append((len(private), max(n.meta["index"] for n in nodes), common, nodes))
    seen: set[tuple[fx.Node, ...]] = set()
    for _, _, common, nodes in sorted(sets, key=lambda s: (-s[0], -s[1])):
        for strip in (True, False):
            branches = [_branch_to(flow, n, common, strip) for n in nodes]
            ends = tuple(b.end for b in branches if b is not None)
            if len(ends) == len(nodes) and ends not in seen:
                seen.add(ends)
                yield [b for b in branches if b is not None]


def _union(masks: set[int]) -> int:
    """The union of bit masks; it equals their sum where no two share a bit."""
    union = 0
    for mask in masks:
        union |= mask
    return union


def _branch_to(flow: Flow, end: fx.Node, common: int, strip: bool) -> Branch | None:
    """The calls over one expert's Parameters that lead to ``end``; None where the calls read several input tensors."""
    private = flow.regions[end] & ~common
    while strip and moves_rows(end):
        inputs = [a for a in end.all_input_nodes if a in flow.from_input]
        if len(inputs) != 1 or flow.regions[inputs[0]] & private != private or inputs[0].meta.get("dtype") is None:
            break
        end = inputs[0]
    inside, stack = {end}, [end]
    live_ins: dict[fx.Node, None] = {}
    while stack:
        for a in stack.pop().all_input_nodes:
            if a in inside or a not in flow.from_input:
                continue
            if flow.regions[a] & private:
                inside.add(a)
                stack.append(a)
            else:
                live_ins[a] = None
    widened = with_private_calls(flow, inside, live_ins)
    return branch_of(inside, live_ins) or branch_of(*widened) or branch_of(*widened, most_extra=MOST_EXTRA_INPUTS)


def branch_of(
    inside: set[fx.Node], live_ins: dict[fx.Node, None], end: fx.Node | None = None, most_extra: int = 0
) -> Branch | None:
    """The branch of the calls ``inside``, of which one live-in holds the rows; at most ``most_extra`` more."""
    picked: dict[object, list[fx.Node]] = defaultdict(list)
    for n in sorted(live_ins, key=lambda n: n.meta["index"]):
        picked[_picks(n)].append(n)
    if len(picked) > 1:  # beside other rows, each is a tensor of its own
        picked = {n: [n] for nodes in picked.values() for n in nodes}
    if not 1 <= len(picked) <= 1 + most_extra:
        return None
    start, *beside = sorted((nodes[0] for nodes in picked.values()), key=lambda n: n.meta["index"])
    same = [n for n in live_ins if n is not start and n not in beside]
    end = end or max(inside, key=lambda n: n.meta["index"])
    if any(len(n.meta.get("shape") or ()) < 2 for n in (start, *beside, end)):
        return None
    if beside and not all(_same_rows(start, other) for other in beside):
        return None
    starts = {start, *same}
    readers = sorted((n for n in inside if starts & set(n.all_input_nodes)), key=lambda n: n.meta["index"])
    return Branch(start, end, inside, readers, tuple(beside), tuple(same))


def _picks(node: fx.Node) -> object:
    """What tells the rows that ``node`` picks, so that ``x[t]`` written twice is the same; else the node itself."""
    if op_name(node) not in ("index", "index_select") or node.kwargs:
        return node
    return node.target, str(node.args)


def _same_rows(one: fx.Node, other: fx.Node) -> bool:
    """Whether both hold floats of one dtype with equally many rows and several features (one may be a weight)."""
    a, b = one.meta["shape"], other.meta["shape"]
    floating = bool(one.meta["dtype"].is_floating_point)
    return floating and bool(a[:-1] == b[:-1]) and min(a[-1], b[-1]) > 1 and one.meta["dtype"] == other.meta["dtype"]


def with_private_calls(
    flow: Flow, inside: set[fx.Node], live_ins: dict[fx.Node, None]
) -> tuple[set[fx.Node], dict[fx.Node, None]]:
    """``inside`` and its live-ins, once preceding calls that only this expert uses (a norm) have moved inside."""
    inside, live_ins = set(inside), dict(live_ins)
    while True:
        private = next((c for c in live_ins if _serves_only(c, inside)), None)
        if private is None:
            return inside, live_ins
        del live_ins[private]
        inside.add(private)
        live_ins.update(dict.fromkeys(a for a in private.all_input_nodes if a in flow.from_input and a not in inside))


def _serves_only(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether every user of ``node``, which selects no rows, is one of the calls ``inside``."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    result = op_name(node) == "getitem" and source is not None and not moves_rows(source)
    moved = moves_rows(node) and op_name(node) not in _VIEWS and not result and not keeps_rows(node)
    users = [u for u in node.users if "index" in u.meta and (u.users or op_name(u) not in _VIEWS)]  # torch.matmul
    return node.op == "call_function" and not moved and all(u in inside for u in users)
