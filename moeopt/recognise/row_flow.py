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
)
"""Movement that picks no rows."""


_SPLITS = ("split", "split_with_sizes", "chunk", "unbind")


MOST_BESIDE = 3
"""Tensors that an expert may read beside its rows."""

_PLACES = ("argmax", "argmin", "argsort", "sort", "topk", "bucketize", "searchsorted", "sum", "cumsum")
"""Calls that make integers of a row's features."""


_SIZES_VARY = (
    "view", "reshape", "_unsafe_view", "expand", "slice", "select", "as_strided", "repeat", "split_with_sizes", "empty",
    "zeros", "new_zeros", "full", "new_empty", "constant_pad_nd", "split", "native_group_norm",
)  # fmt: skip


class Flow:
    """Of each node: whether it depends on the input, the regions it was computed with (bits), and how (a hash).

    ``consumed``: paths of Parameters that some rows met.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.data: set[fx.Node] = set()
        self.touched: dict[fx.Node, int] = {}
        self.how: dict[fx.Node, int] = {}
        self.consumed: set[str] = set()
        self._bit: dict[Any, int] = {}
        self._keys: dict[fx.Node, frozenset[Any]] = {}
        for node in tape.nodes:
            self._enter(node)

    def _enter(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if node.op != "placeholder" and not any(a in self.data for a in inputs):
            self.how[node] = self._weight(node)
            return
        self.data.add(node)
        dtype = node.meta.get("dtype")
        integer = dtype is not None and not dtype.is_floating_point and dtype != torch.bool
        if node.op == "placeholder" or (integer and not _of_features(node)):
            self.touched[node], self.how[node] = 0, hash((node.op == "placeholder", str(dtype)))
            return
        bits = 0
        for a in inputs:
            if a in self.data:
                bits |= self.touched[a]
                continue
            keys = self._regions(a)
            if 0 not in (node.meta.get("shape") or ()):
                self.consumed.update(path for path, _ in keys)
            for key in keys:
                bits |= 1 << self._bit.setdefault(key, len(self._bit))
        self.touched[node] = bits
        chosen = integer or dtype == torch.bool  # which expert it is about is no part of how it is computed
        self.how[node] = hash((False, str(dtype))) if chosen else self._hash(node)

    def _weight(self, node: fx.Node) -> int:
        """A weight is its dtype and shape, whichever place of a bank it comes from; expanded to rows, what it was."""
        if op_name(node) == "expand":
            return self.how[node.all_input_nodes[0]]
        return hash(("weight", str(node.meta.get("dtype")), node.meta.get("shape")))

    def _regions(self, node: fx.Node) -> frozenset[Any]:
        """(path, origin) of each region of a Parameter that a value is made of, the input aside."""
        if node not in self._keys:
            shape = node.meta.get("shape") or ()
            source = element_source(self.tape, node, (0,) * len(shape)) if 0 not in shape and len(shape) else None
            single = len(node.all_input_nodes) < 2
            if source is not None and single and source[0].op == "get_attr" and "constant" not in source[0].meta:
                self._keys[node] = frozenset([(str(source[0].target), source[1])])
            elif node.op == "get_attr":
                self._keys[node] = frozenset() if "constant" in node.meta else frozenset([(str(node.target), ())])
            else:
                self._keys[node] = frozenset().union(*(self._regions(a) for a in node.all_input_nodes))
        return self._keys[node]

    def _hash(self, node: fx.Node) -> int:
        name = op_name(node)

        def word(a: PyObject) -> PyObject:
            if isinstance(a, fx.Node):
                return self.how[a]
            return tuple(word(x) for x in a) if isinstance(a, (list, tuple)) else repr(a)

        of_split = name == "getitem" and op_name(node.args[0]) in _SPLITS  # type: ignore[arg-type]
        args = node.all_input_nodes if name in _SIZES_VARY or of_split else node.args
        return hash((name, word(args), repr(sorted(node.kwargs, key=str))))


def _of_features(node: fx.Node) -> bool:
    """Whether integers may be places among a row's own features (a rank, a code), not places among the rows."""
    return op_name(node) in _PLACES or moves_rows(node) or is_pointwise(node)


@dataclass
class Branch:
    """One expert on some rows: from ``start``, a rows tensor, to ``end``, through the calls ``inside``.

    ``beside``: further tensors with a row for each row of ``start`` (a condition, a product that all experts share).
    ``axis``: the dimension of ``start`` in which a row's features stand.
    """

    start: fx.Node
    end: fx.Node
    inside: set[fx.Node]
    readers: list[fx.Node] = field(default_factory=list)
    beside: tuple[fx.Node, ...] = ()

    @property
    def axis(self) -> int:
        return features_axis(self.start, self.inside, self.readers)


def features_axis(start: fx.Node, inside: set[fx.Node], readers: Iterable[fx.Node]) -> int:
    """1 where what reads ``start`` leads, element by element, to convolutions and no movement: channels; else the last
    dimension."""
    queue = list(readers)
    for node in queue:  # it grows
        if op_name(node) == "convolution":
            return 1
        norm = "batch_norm" in op_name(node) and len(start.meta["shape"]) > 2
        if is_pointwise(node) or norm or node.target is operator.getitem:
            queue += [u for u in node.users if u in inside and u not in queue]
    return -1


def parallel(flow: Flow) -> Iterator[list[Branch]]:
    """Sets of values computed alike from Parameters of their own, the largest and latest first."""
    alike: dict[int, list[fx.Node]] = defaultdict(list)
    for node, bits in flow.touched.items():
        dtype = node.meta.get("dtype")
        if bits and dtype is not None and dtype.is_floating_point:
            alike[flow.how[node]].append(node)
    sets = []
    for nodes in alike.values():
        common = -1
        for node in nodes:
            common &= flow.touched[node]
        own = {flow.touched[n] & ~common for n in nodes}
        if len(own) > 1 and 0 not in own and sum(own) == _union(own):
            sets.append((len(own), max(n.meta["index"] for n in nodes), common, nodes))
    seen: set[tuple[fx.Node, ...]] = set()
    for _, _, common, nodes in sorted(sets, key=lambda s: (-s[0], -s[1])):
        for strip in (True, False):
            branches = [_branch(flow, n, common, strip) for n in nodes]
            ends = tuple(b.end for b in branches if b is not None)
            if len(ends) == len(nodes) and ends not in seen:
                seen.add(ends)
                yield [b for b in branches if b is not None]


def _union(masks: set[int]) -> int:
    """The union of sets of bits; it equals their sum where no two share a bit."""
    whole = 0
    for mask in masks:
        whole |= mask
    return whole


def _branch(flow: Flow, end: fx.Node, common: int, strip: bool) -> Branch | None:
    """The calls over this expert's own Parameters that lead to ``end``; None where they start from several tensors."""
    own = flow.touched[end] & ~common
    while strip and moves_rows(end):
        inputs = [a for a in end.all_input_nodes if a in flow.data]
        if len(inputs) != 1 or flow.touched[inputs[0]] & own != own or inputs[0].meta.get("dtype") is None:
            break
        end = inputs[0]
    inside, stack = {end}, [end]
    cuts: dict[fx.Node, None] = {}
    while stack:
        for a in stack.pop().all_input_nodes:
            if a in inside or a not in flow.data:
                continue
            if flow.touched[a] & own:
                inside.add(a)
                stack.append(a)
            else:
                cuts[a] = None
    wider = widened(flow, inside, cuts)
    return closed(inside, cuts) or closed(*wider) or closed(*wider, most=MOST_BESIDE)


def closed(inside: set[fx.Node], cuts: dict[fx.Node, None], end: fx.Node | None = None, most: int = 0) -> Branch | None:
    """The branch of the calls ``inside``, which read the tensors ``cuts``: one of rows, and at most ``most`` more."""
    if not 1 <= len(cuts) <= 1 + most:
        return None
    start, *beside = sorted(cuts, key=lambda n: n.meta["index"])
    end = end or max(inside, key=lambda n: n.meta["index"])
    if any(len(n.meta.get("shape") or ()) < 2 for n in (*cuts, end)):
        return None
    if beside and not all(_alike_rows(start, other) for other in beside):
        return None
    readers = sorted((n for n in inside if start in n.all_input_nodes), key=lambda n: n.meta["index"])
    return Branch(start, end, inside, readers, tuple(beside))


def _alike_rows(one: fx.Node, other: fx.Node) -> bool:
    """Whether both hold floats of one dtype and as many rows, features last: several, as one may be a weight."""
    a, b = one.meta["shape"], other.meta["shape"]
    floating = bool(one.meta["dtype"].is_floating_point)
    return floating and bool(a[:-1] == b[:-1]) and min(a[-1], b[-1]) > 1 and one.meta["dtype"] == other.meta["dtype"]


def widened(flow: Flow, inside: set[fx.Node], cuts: dict[fx.Node, None]) -> tuple[set[fx.Node], dict[fx.Node, None]]:
    """With the calls before them that serve this expert alone (a norm without weights of its own)."""
    inside, cuts = set(inside), dict(cuts)
    while True:
        more = next((c for c in cuts if _alone(c, inside)), None)
        if more is None:
            return inside, cuts
        del cuts[more]
        inside.add(more)
        cuts.update(dict.fromkeys(a for a in more.all_input_nodes if a in flow.data and a not in inside))


def _alone(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether ``node`` computes something, or only views it, for these calls and no others."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    result = op_name(node) == "getitem" and source is not None and not moves_rows(source)
    moved = moves_rows(node) and op_name(node) not in _VIEWS and not result and not _parts_features(node)
    users = [u for u in node.users if "index" in u.meta]
    return node.op == "call_function" and not moved and all(u in inside for u in users)


def _parts_features(node: fx.Node) -> bool:
    """Whether ``node`` takes some of the last dimension of its operand, so that every row stays where it is."""
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    name, source = op_name(node), node.all_input_nodes[0] if node.all_input_nodes else None
    rank = len((source.meta.get("shape") if source is not None else None) or ())
    place = 1 if name in ("slice", "select", "unbind") else 2
    if name not in ("slice", "select", *_SPLITS) or len(node.args) <= place or rank < 2:
        return False
    return int(node.args[place]) % rank == rank - 1  # type: ignore[arg-type]
