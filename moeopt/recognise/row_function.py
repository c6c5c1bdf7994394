"""Experts of any function of a row: found as values that are computed alike from different Parameters.

    x[t_e] --(calls over Parameters of e alone)--> out_e --weigh, combine--> y

``recognise.experts`` looks for two matmuls with something element-wise between; here nothing is known of the
function. Each value computed from the input is described twice: *how*, a hash of the calls that lead to it with
weights and sizes left out, and *of what*, the regions of Parameters that it depends on. Values that are computed alike
from Parameters that they do not share are what parallel experts hold; the last such values that depend on one rows
tensor alone are the experts' outputs (a routing weight is a second one). ``row_graph`` then writes the calls between as
one graph, and must find the same graph for each. Tokens, combine and routing are read as for all experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.ir.weight_refs import MatrixRef, SlotRefs, tensor_at
from moeopt.recognise.combine import Labels, read_combine
from moeopt.recognise.experts import ExpertsNotHit, Recognition, siblings, with_frontier
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.gemm_sites import GemmSite
from moeopt.recognise.row_graph import RowGraphReader
from moeopt.recognise.token_rows import Tokens, token_readings
from moeopt.recognise.weight_source import element_source

MOST_TRIES = 24
"""Sets of parallel values that are tried in one block."""
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
_SIZES_VARY = (
    "view", "reshape", "_unsafe_view", "expand", "slice", "select", "as_strided", "repeat", "split_with_sizes", "empty",
    "zeros", "new_zeros", "full", "new_empty", "constant_pad_nd", "split", "native_group_norm",
)  # fmt: skip


def recognize_functions(tape: Tape, known: list[Recognition] | None = None, *, idle: bool = False) -> list[Recognition]:
    """Every group of experts in the block that are functions of a row, in execution order.

    Args:
        known: what an earlier probe call with every expert showed.
        idle: accept weights that no token reached, if ids did name them.

    Raises:
        Declined: there is none; the reason is that of the set that came furthest.
    """
    flow = Flow(tape)
    found: list[Recognition] = []
    nearest, far = Declined("no values on its tape are computed alike from Parameters of their own"), -1
    for tries, branches in enumerate(_parallel(flow)):
        if tries == MOST_TRIES:
            break
        if any(b.end in r.interior for b in branches for r in found):
            continue
        for reading in _readings(flow, branches):
            progress = [0]
            try:
                found.append(_read(tape, flow, reading, known, idle, progress))
                break
            except ExpertsNotHit:
                raise
            except Declined as err:
                if progress[0] > far:
                    nearest, far = err.with_traceback(None), progress[0]
    if not found:
        nearest.progress = far  # type: ignore[attr-defined]
        try:
            raise nearest
        finally:
            del nearest
    return sorted(found, key=lambda r: r.combine.node.meta["index"])


# -- what each value is computed from -----------------------------------------------------------------


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
        if node.op == "placeholder" or integer:
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
        self.how[node] = self._hash(node)

    def _weight(self, node: fx.Node) -> int:
        """A weight is its dtype and shape, whichever place of a bank it comes from."""
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

        def word(a: Any) -> Any:
            if isinstance(a, fx.Node):
                return self.how[a]
            return tuple(word(x) for x in a) if isinstance(a, (list, tuple)) else repr(a)

        of_split = name == "getitem" and op_name(node.args[0]) in _SPLITS  # type: ignore[arg-type]
        args = node.all_input_nodes if name in _SIZES_VARY or of_split else node.args
        return hash((name, word(args), repr(sorted(node.kwargs, key=str))))


# -- parallel values ----------------------------------------------------------------------------------


@dataclass
class Branch:
    """One expert on some rows: from ``start``, a rows tensor, to ``end``, through the calls ``inside``."""

    start: fx.Node
    end: fx.Node
    inside: set[fx.Node]
    readers: list[fx.Node] = field(default_factory=list)


def _parallel(flow: Flow) -> Iterator[list[Branch]]:
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
    """Their union; equal to their sum where no two share a bit."""
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
    return _closed(inside, cuts) or _closed(
        *_widened(flow, inside, cuts),
    )


def _closed(inside: set[fx.Node], cuts: dict[fx.Node, None], end: fx.Node | None = None) -> Branch | None:
    if len(cuts) != 1:
        return None
    (start,) = cuts
    end = end or max(inside, key=lambda n: n.meta["index"])
    if any(len(n.meta.get("shape") or ()) < 2 for n in (start, end)):
        return None
    readers = sorted((n for n in inside if start in n.all_input_nodes), key=lambda n: n.meta["index"])
    return Branch(start, end, inside, readers)


def _widened(flow: Flow, inside: set[fx.Node], cuts: dict[fx.Node, None]) -> tuple[set[fx.Node], dict[fx.Node, None]]:
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
    moved = moves_rows(node) and op_name(node) not in _VIEWS and not result
    users = [u for u in node.users if "index" in u.meta]
    return node.op == "call_function" and not moved and all(u in inside for u in users)


def _readings(flow: Flow, branches: list[Branch]) -> Iterator[list[Branch]]:
    """The branches as they are; then from further back, where what leads to them serves single experts."""
    yield branches
    wider = [_closed(*_widened(flow, b.inside, {b.start: None}), b.end) for b in branches]
    found = [b for b in wider if b is not None]
    if len(found) == len(branches) and any(a.start is not b.start for a, b in zip(found, branches, strict=True)):
        yield found


# -- one set as a block -------------------------------------------------------------------------------


def _read(
    tape: Tape, flow: Flow, branches: list[Branch], known: list[Recognition] | None, idle: bool, progress: list[int]
) -> Recognition:
    graphs, group = [], [_chain(b) for b in branches]
    for branch in branches:  # one without rows is an expert that no token chose, called all the same
        idle_here = 0 in branch.end.meta["shape"] or 0 in branch.start.meta["shape"]
        graphs.append(None if idle_here else RowGraphReader(tape, branch.start, branch.end, branch.inside))
    met = [g for g in graphs if g is not None]
    if not met:
        raise Declined("no token reached its experts")
    texts = {g.text for g in met}
    if len(texts) > 1:
        raise Declined("its experts do not all compute the same function", group[0].out.node.meta.get("source"))
    spec = RowFunction(texts.pop(), str(group[0].out.node.meta["dtype"]).removeprefix("torch."))
    progress[0] = 1
    keys: dict[Any, SlotRefs] = {r.slots: r for k in known or [] for r in k.experts if isinstance(r, SlotRefs)}
    slots = list(dict.fromkeys(tuple(g.slots) for g in met))
    if known is not None and not set(slots) & set(keys):
        raise Declined("these are no experts of the first probe")
    own = next((p for p, refs in enumerate(zip(*slots, strict=True)) if len(set(refs)) > 1), 0)
    experts = list(keys.values()) if known is not None else [SlotRefs(s, own) for s in slots]
    number = {ref.slots: e for e, ref in enumerate(experts)}
    if any(s not in number for s in slots):
        raise ExpertsNotHit(
            "a probe reached an expert that the first probe did not", group[0].out.node.meta.get("source")
        )
    missing = 0
    if known is None:
        missing = _missing(tape, flow, experts)
        if missing and not idle:
            error = ExpertsNotHit(
                f"no probe token reached {missing} of its experts, so what they compute could not be checked; pass "
                "example inputs that reach every expert",
                group[0].out.node.meta.get("source"),
            )
            error.num_named = len(experts) + missing
            raise error
    sites = list(dict.fromkeys(s for c in group for s in c.ins))
    numbers = [-1 if g is None else number[tuple(g.slots)] for g in graphs]
    nearest = Declined("the experts' input rows are not rows of any one tensor")
    for tokens in token_readings(tape, sites):
        labels = _labels(group, numbers, tokens, len(experts))
        here = [2]
        try:
            combine = read_combine(tape, labels)
            here[0] = 3
            return with_frontier(tape, group, tokens, labels, experts, spec, combine, {}, known, missing, here)
        except ExpertsNotHit:
            raise
        except Declined as err:
            if here[0] > progress[0]:
                nearest, progress[0] = err.with_traceback(None), here[0]
    try:
        raise nearest
    finally:
        del nearest


def _chain(branch: Branch) -> FFNCandidate:
    """The branch as others read experts: where its rows come in and go out."""
    shape, out = branch.start.meta["shape"], branch.end.meta["shape"]
    region = MatrixRef("", (), (), (), shape[-1], out[-1])
    matrix = torch.zeros(math.prod(shape[:-1]), dtype=torch.long)

    def site(node: fx.Node) -> GemmSite:
        return GemmSite(node, node, branch.start, len(shape) - 1, len(out) - 1, [region], matrix)

    return FFNCandidate([site(r) for r in branch.readers], [site(branch.end)], [], ())


def _labels(group: list[FFNCandidate], numbers: list[int], tokens: Tokens, count: int) -> Labels:
    labels = Labels({}, {}, tokens.count, count)
    for candidate, expert in zip(group, numbers, strict=True):
        token = tokens.token[candidate.ins[0]]
        labels.token[candidate.out] = token
        labels.candidate[candidate.out] = torch.where(token >= 0, expert, -1)
    return labels


def _missing(tape: Tape, flow: Flow, experts: list[SlotRefs]) -> int:
    """How many experts there are by their Parameters' names, or places in one bank, that no token reached."""
    named = {**dict(tape.root.named_parameters(remove_duplicate=False)), **dict(tape.root.named_buffers())}
    refs = [ref.w_out for ref in experts]
    used = {ref.path for ref in refs}
    held = {id(tensor_at(tape.root, path)) for path in used}
    shapes = {tensor_at(tape.root, path).shape for path in used}
    names = set() if len(used) == 1 and len(refs) > 1 else siblings(used, named)
    missing = [n for n in names if id(named[n]) not in held and named[n].shape in shapes and n not in flow.consumed]
    for path in used:
        starts = sorted({ref.origin for ref in refs if ref.path == path})
        apart = [a for a in range(len(starts[0])) if len({s[a] for s in starts}) > 1]
        if len(apart) == 1:
            places = sorted({s[apart[0]] for s in starts})
            step = min(b - a for a, b in zip(places, places[1:], strict=False))
            missing += [path] * (tensor_at(tape.root, path).shape[apart[0]] // step - len(places))
    return len(missing)
