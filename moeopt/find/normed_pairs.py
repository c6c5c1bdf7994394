"""Places of experts that have a norm between their products, where no list of modules shows them.

    y = sum over e of g_e(x) * (norm(x A_e) B_e)

An FFN candidate ends at a norm, since streams of layers have them too. Here pairs of products are taken with whatever
stands between that looks at one row, if several such pairs begin at the same rows, and something as wide as they are
many chooses among them or weighs them. A file has no modules, and so have experts that are Parameters of one module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from moeopt.capture.op_kinds import (
    CHOICES_AMONG,
    GATES,
    is_factory,
    is_matmul,
    is_pointwise,
    moves_rows,
    op_name,
)
from moeopt.capture.replay import ancestors
from moeopt.find.block_candidates import BlockCandidate, identity_of, len_of_stack
from moeopt.find.light_sites import leaf_of
from moeopt.find.module_lists import gate_width, results_meet, row_sources
from moeopt.find.unread_blocks import UnreadBlocks
from moeopt.recognise.gemm_sites import is_weight, weight_and_operand

_OF_A_ROW = frozenset(
    ("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training")
    + ("cudnn_batch_norm", "mean", "sum", "var", "var_mean", "std", "linalg_vector_norm", "norm", "amax", "_softmax")
    + ("rms_norm", "_fused_rms_norm", "_log_softmax")
)
_STEPS = 48
"""Nodes between two products of one expert."""


@dataclass(frozen=True)
class _Pair:
    """A product, those before it, behind a norm, the rows that these begin at, and the weights of all."""

    ins: tuple[fx.Node, ...]
    out: fx.Node
    rows: fx.Node
    weights: tuple[fx.Node, ...]

    @property
    def products(self) -> tuple[fx.Node, ...]:
        return (*self.ins, self.out)


def normed_pairs(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """The mixtures of such experts in the run of ``unread``."""
    memo: dict[fx.Node, bool] = {}
    groups: dict[Any, list[_Pair]] = {}
    for node in unread.tape.nodes:
        pair = _pair(node, memo)
        if pair is not None:
            groups.setdefault(tuple(weight.meta["shape"] for weight in pair.weights), []).append(pair)
    gates = [n for n in unread.tape.nodes if op_name(n) in (*GATES, *CHOICES_AMONG, "argmin")]
    for several in groups.values() if gates else ():
        for group in _parallel(several):
            experts = sum({identity_of(p.out): len_of_stack(p.out) for p in group}.values())
            place = _place(unread, group, experts)
            if place is not None and experts > 1 and experts in {gate_width(n) for n in _beside(gates, place, group)}:
                yield place


def _pair(node: fx.Node, memo: dict[fx.Node, bool]) -> _Pair | None:
    """The pair whose second product is ``node``; None where it is none, or no norm stands between."""
    found = weight_and_operand(node, memo) if is_matmul(node) else None
    if found is None:
        return None
    ins: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    todo, seen, norms = [found[1]], set[fx.Node](), 0
    while todo:
        here = todo.pop()
        if here in seen or is_weight(here, memo) or here.op == "get_attr" or is_factory(here):
            continue
        seen.add(here)
        first = weight_and_operand(here, memo) if is_matmul(here) else None
        if first is not None:
            ins[here] = first[:2]
            continue
        norm = op_name(here) in _OF_A_ROW
        if len(seen) > _STEPS or not (norm or is_pointwise(here) or moves_rows(here)):
            return None
        norms += norm
        todo += here.all_input_nodes
    if not norms or not 1 <= len(ins) <= 2:
        return None
    ordered = sorted(ins, key=lambda n: int(n.meta["index"]))
    return _Pair(tuple(ordered), node, ins[ordered[0]][1], (*(ins[n][0] for n in ordered), found[0]))


def _parallel(pairs: Sequence[_Pair]) -> list[list[_Pair]]:
    """The pairs that begin at the same rows, none of them behind another, and have products of their own."""
    groups: list[tuple[set[fx.Node], list[_Pair]]] = []
    for pair in pairs:
        sources = row_sources(pair.rows, through_sums=False)
        home = next((group for group in groups if group[0] & sources), None)
        if home is None:
            groups.append((sources, [pair]))
        else:
            home[0].intersection_update(sources)
            home[1].append(pair)
    found = []
    for _, group in groups:
        alone = len({identity_of(p.out) for p in group}) == len({identity_of(p.ins[0]) for p in group}) == len(group)
        if alone and (len(group) == 1 or not ancestors(group[-1].ins) & {p.out for p in group}):
            found.append(group)
    return found


def _place(unread: UnreadBlocks, group: Sequence[_Pair], experts: int) -> BlockCandidate | None:
    products = [product for pair in group for product in pair.products]
    paths = [leaf_of(unread.tape, weight)[0] for pair in group for weight in pair.weights]
    if any(path not in unread.named for path in paths):
        return None
    if len(group) > 1 and not results_meet(unread.tape, [pair.out for pair in group]):
        return None
    inside = set.intersection(*(set(unread.tape.stack(product.meta["call"])) for product in products))
    first = min(int(product.meta["index"]) for product in products)
    return unread.place(unread.tape.calls[max(inside)], first, experts, {id(unread.named[p]) for p in paths})


def _beside(gates: Sequence[fx.Node], place: BlockCandidate, group: Sequence[_Pair]) -> Iterator[fx.Node]:
    """The gates in the calls around a place that are no part of its experts: those of a softmax between products are
    computed of their first ones."""
    inner = {product for pair in group for product in pair.ins}
    for gate in gates:
        if any(level.first <= gate.meta["index"] < level.last for level in place.levels) and not (
            ancestors([gate], inner) & inner
        ):
            yield gate
