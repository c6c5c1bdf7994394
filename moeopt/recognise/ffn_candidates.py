"""FFN candidates: a matmul into the intermediate size, something element-wise, a matmul out of it.

    rows -> W_in (one or two sites) -> element-wise function -> W_out -> rows

An expert is a candidate; so is a dense FFN. Attention is not one: between its projections rows of
different tokens mix. A residual stream with its norms is not one either: it adds rows that no
matmul made, or divides by a statistic of the whole row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from moeopt.capture.op_kinds import is_factory, is_pointwise, moves_rows, op_name
from moeopt.capture.tape import Tape
from moeopt.recognise.gemm_sites import GemmSite, is_weight
from moeopt.value_types import PyObject

_NONLINEAR = ("silu", "gelu", "relu", "sigmoid", "tanh", "pow", "mish", "softplus", "elu", "leaky_relu", "clamp",
              "hardtanh", "mul", "exp", "erf", "maximum", "where", "square", "clamp_min", "hardswish", "hardsigmoid",
              "threshold", "abs", "minimum", "clamp_max", "celu", "selu", "log_sigmoid", "glu", "rsqrt")  # fmt: skip


_VALUE_ARGS = {"index": (0,), "index_select": (0,), "gather": (0,), "index_put": (0, 2), "masked_select": (0,)}


@dataclass(eq=False)
class FFNCandidate:
    """Out-sites with the in-sites that feed them and the nodes between, in order.

    Usually one out-site fed by one in-site (two when gate and up are separate). Where all experts' rows
    are concatenated for the activation and split again, all of them are one candidate.
    """

    ins: list[GemmSite]
    outs: list[GemmSite]
    mid: list[fx.Node]
    signature: tuple[Any, ...]

    @property
    def out(self) -> GemmSite:
        """The first out-site."""
        return self.outs[0]

    def roles(self) -> list[list[GemmSite]]:
        """In-sites by role: [[packed or plain]] or [[gate...], [up...]] (in either order), alike in length.

        In-sites of one expert read the same rows.
        """
        if len(self.outs) == 1 and len(self.ins) <= 2:
            return [[s] for s in self.ins]
        groups: dict[Any, list[GemmSite]] = {}
        known: dict[fx.Node, Any] = {}
        for site in self.ins:
            groups.setdefault(same_rows(site.operand, known), []).append(site)
        sizes = {len(g) for g in groups.values()}
        if len(sizes) != 1 or max(sizes) > 2:
            return []
        return [[g[r] for g in groups.values()] for r in range(max(sizes))]

    @property
    def shape(self) -> tuple[Any, ...]:
        """What parallel experts have in common: the sizes of their matrices."""
        ends = (self.ins[0].matrices[0], self.out.matrices[0])
        return (len(self.ins) if len(self.outs) == 1 else len(self.roles()), *((r.k, r.m) for r in ends))

    @property
    def merged(self) -> bool:
        """True where one candidate serves several experts at once (bmm, grouped, gathered weights)."""
        return len(self.outs) > 1 or any(len(s.matrices) > 1 for s in (*self.ins, self.out))

    @property
    def nonlinear(self) -> bool:
        """True where something other than copying and scaling stands between the matmuls."""
        return any(op_name(n) in _NONLINEAR for n in self.mid)


def same_rows(node: fx.Node, known: dict[fx.Node, Any]) -> PyObject:
    """What is equal for nodes that hold the same rows of one tensor, sliced or picked anew for each matmul.

    Args:
        known: answers so far, kept between calls.
    """
    if node not in known:
        known[node] = node
        if moves_rows(node):
            parts = [same_rows(a, known) if isinstance(a, fx.Node) else _plain(a, known) for a in node.args]
            kwargs = [(name, _plain(a, known)) for name, a in sorted(node.kwargs.items())]
            known[node] = (node.target, tuple(parts), tuple(kwargs))
    return known[node]


def _plain(a: PyObject, known: dict[fx.Node, Any]) -> PyObject:
    if isinstance(a, fx.Node):
        return same_rows(a, known)
    return tuple(_plain(part, known) for part in a) if isinstance(a, (list, tuple)) else repr(a)


def find_candidates(tape: Tape, sites: list[GemmSite], *, loose: bool = False) -> list[FFNCandidate]:
    """Every candidate among ``sites``, in the order of their out-sites.

    ``loose`` also takes a first matmul that serves several experts side by side (m a multiple of k).
    """
    at = {s.node: s for s in sites if s.matrices}
    matmuls = {s.matmul: s for s in sites if s.matrices}
    memo: dict[fx.Node, bool] = {}
    candidates = []
    wide: dict[tuple[GemmSite, ...], list[tuple[GemmSite, list[fx.Node]]]] = {}
    for site in sites:
        if not site.matrices:
            continue
        found = _walk_back(site.operand, at, matmuls, memo, loose)
        if found is None:
            continue
        ins, mid = found
        if 1 <= len(ins) <= 2 and all(_feeds(i, site, loose) for i in ins):
            ins.sort(key=lambda s: s.node.meta["index"])
            candidates.append(FFNCandidate(ins, [site], mid, _signature(mid, ins)))
        elif len(ins) > 2 and all(_feeds(i, site, loose) for i in ins):
            ins.sort(key=lambda s: s.node.meta["index"])
            wide.setdefault(tuple(ins), []).append((site, mid))
    for ins_key, members in wide.items():
        nodes = sorted({n for _, mid in members for n in mid}, key=lambda n: n.meta["index"])
        if _adds_experts(nodes, ins_key):
            continue
        candidates.append(
            FFNCandidate(list(ins_key), [s for s, _ in members], nodes, ("wide", _signature(nodes, list(ins_key))))
        )
    return candidates


def _adds_experts(mid: list[fx.Node], ins: tuple[GemmSite, ...]) -> bool:
    """True where rows of different matmuls meet element by element: a sum of experts, not rows side by side."""
    known: dict[fx.Node, Any] = {}
    of: dict[fx.Node, frozenset[Any]] = {s.node: frozenset([same_rows(s.operand, known)]) for s in ins}
    for node in mid:
        parts = [of[a] for a in node.all_input_nodes if of.get(a)]
        if is_pointwise(node) and len(set(parts)) > 1:
            return True
        of[node] = frozenset().union(*parts)
    return False


def _feeds(a: GemmSite, b: GemmSite, loose: bool) -> bool:
    m, k = a.matrices[0].m, b.matrices[0].k
    return m in (k, 2 * k) or (loose and m % k == 0)


def _walk_back(
    start: fx.Node,
    at: dict[fx.Node, GemmSite],
    matmuls: dict[fx.Node, GemmSite],
    memo: dict[fx.Node, bool],
    loose: bool,
) -> tuple[list[GemmSite], list[fx.Node]] | None:
    ins: dict[GemmSite, None] = {}
    seen: set[fx.Node] = set()
    mid: list[fx.Node] = []
    statistics: list[fx.Node] = []
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in at:
            ins[at[node]] = None
        elif node in matmuls or node.op == "placeholder":
            return None
        elif node.op == "get_attr" or is_factory(node) or is_weight(node, memo):
            continue
        elif is_pointwise(node) or moves_rows(node):
            mid.append(node)
            stack.extend(_value_inputs(node))
        elif not _small(node, start, loose):
            return None
        else:
            statistics.append(node)
    if any(_reduces(node, {s.node for s in ins}) for node in statistics):
        return None
    mid.sort(key=lambda n: n.meta["index"])
    return (list(ins), mid) if ins else None


def _value_inputs(node: fx.Node) -> list[fx.Node]:
    name = op_name(node)
    if name in _VALUE_ARGS:
        picks = [node.args[i] for i in _VALUE_ARGS[name] if i < len(node.args)]
        return [p for p in picks if isinstance(p, fx.Node)]
    if is_pointwise(node):
        return node.all_input_nodes  # a comparison of the rows, too, is part of the function (relu by torch.where)
    return [a for a in node.all_input_nodes if a.meta.get("dtype") is None or a.meta["dtype"].is_floating_point]


def _small(node: fx.Node, start: fx.Node, loose: bool) -> bool:
    """At most one value per row: a weight or a mask, not a stream of rows (``loose``: clearly fewer values)."""
    of = start.meta["shape"]
    if node.meta.get("shape") is None:  # several tensors: attention gives rows, topk numbers that weigh them
        return "attention" not in op_name(node) or all(
            _small(part, start, loose) for part in node.users if part.meta.get("shape") is not None
        )
    shape = node.meta["shape"]
    if any(type(s) is not int for s in (*shape, *of)):  # a nested tensor: rows of unequal length
        return False
    size, total, longest = math.prod(shape), math.prod(of), max(of or (1,))
    return size * longest <= total or size == 1 or (loose and size * 4 <= total)


def _reduces(node: fx.Node, at: set[fx.Node], limit: int = 64) -> bool:
    """True where ``node`` is a statistic of one of the matmuls ``at`` within a few steps: a norm."""
    stack: list[fx.Node] = [node]
    seen: set[fx.Node] = set()
    while stack and len(seen) < limit:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in at:
            return True
        stack.extend(current.all_input_nodes)
    return False


_SIZES_VARY = {"view", "reshape", "_unsafe_view", "expand", "slice", "select", "as_strided", "repeat", "getitem",
               "split_with_sizes", "index_put", "slice_scatter", "select_scatter", "empty", "zeros", "new_zeros",
               "full", "new_empty", "constant_pad_nd"}  # fmt: skip


def _signature(mid: list[fx.Node], ins: list[GemmSite]) -> tuple[Any, ...]:
    """The candidate's function written down without its row counts, to see that two candidates compute the same."""
    number: dict[fx.Node, Any] = {s.node: ("in", i) for i, s in enumerate(ins)}
    lines = []
    for i, node in enumerate(mid):
        number[node] = i

        def word(a: PyObject) -> PyObject:
            if isinstance(a, fx.Node):
                return number.get(a, ("other", a.op))
            if isinstance(a, (list, tuple)):
                return tuple(word(x) for x in a)
            return repr(a)

        scalars = node.args if op_name(node) not in _SIZES_VARY else node.all_input_nodes
        lines.append((str(node.target), tuple(word(a) for a in scalars), repr(sorted(node.kwargs.items(), key=str))))
    return tuple(lines)
