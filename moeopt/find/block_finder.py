"""Places of blocks: groups of the model's feed-forward candidates, and what ``unread_blocks`` finds without any."""

from __future__ import annotations

import re
from bisect import bisect
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from torch import fx, nn

from moeopt.capture.op_kinds import is_pointwise, moves_rows, op_name, picks_rows
from moeopt.capture.tape import Call, Tape
from moeopt.find.asked_values import mark_steered
from moeopt.find.block_candidates import (
    BlockCandidate,
    closest,
    counted_by_name,
    each_once,
    identity_of,
    len_of_stack,
    numbered_tensors,
)
from moeopt.find.module_lists import results_meet, row_sources
from moeopt.find.normed_pairs import normed_pairs
from moeopt.find.single_products import single_products
from moeopt.find.unread_blocks import UnreadBlocks
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.ffn_groups import group_candidates
from moeopt.recognise.gemm_sites import GemmSite

_ROUTES = (
    "topk",
    "argmax",
    "argmin",
    "sort",
    "argsort",
    "max",
    "min",
    "kthvalue",
    "multinomial",
    "_softmax",
    "softmax",
)


_SHARES = ("softmax", "_softmax", "mean", "sum")
_CHOICES = ("topk", "argmax", "argmin", "kthvalue", "multinomial")


class Finder:
    def __init__(self, tape: Tape, candidates: list[FFNCandidate], leaves: dict[GemmSite, tuple[str, bool]]) -> None:
        self.tape, self.candidates, self.leaves = tape, candidates, leaves
        self.home = {c: self._common([*c.outs, *c.ins]) for c in candidates}
        self.named = {**dict(tape.root.named_parameters(remove_duplicate=False)), **dict(tape.root.named_buffers())}
        used = {path for path, _ in leaves.values()}
        self.idle = {key for name, t in self.named.items() if name not in used for key in numbered_tensors(name, t)}
        self._tensors_of: dict[nn.Module, set[int]] = {}
        self._twins = Counter(key[:2] for name, t in self.named.items() for key in numbered_tensors(name, t))

    def _common(self, sites: list[GemmSite]) -> int:
        stacks = [self.tape.stack(s.matmul.meta["call"]) for s in sites]
        common = 0
        for level in zip(*stacks, strict=False):
            if len(set(level)) > 1:
                break
            common = level[0]
        return common

    def run(self) -> list[BlockCandidate]:
        places: list[BlockCandidate] = []
        claimed: set[FFNCandidate] = set()
        by_depth = sorted(self.tape.calls, key=lambda c: -len(self.tape.stack(c.index)))
        inside: dict[int, list[FFNCandidate]] = {}
        for candidate in self.candidates:
            for index in self.tape.stack(self.home[candidate]):
                inside.setdefault(index, []).append(candidate)
        for call in by_depth:
            free = [c for c in inside.get(call.index, []) if c not in claimed]
            if not free:
                continue
            for group in self._expert_groups(call, free):
                claimed.update(group)
                places.append(self._place("moe", call, group))
        for group in self._picked(c for c in self.candidates if c not in claimed):
            claimed.update(group)
            index = self._common([s for c in group for s in (*c.ins, *c.outs)])
            places.append(self._place("moe", self.tape.calls[index], group))
        experts = {s for c in claimed for s in (*c.ins, *c.outs)}
        blocks = {p.call.index for p in places}
        for candidate in self.candidates:
            if experts.isdisjoint((*candidate.ins, *candidate.outs)) and self._feed_forward(candidate, blocks):
                places.append(self._place("dense_ffn", self.tape.calls[self.home[candidate]], [candidate]))
        for place in places:
            if place.kind == "moe" and len(place.candidates) > 1:
                place.alone = [
                    self._place("dense_ffn", self.tape.calls[self.home[c]], [c])
                    for c in place.candidates
                    if self._feed_forward(c, blocks)
                ]
        places = closest(places)
        places = each_once(closest(self._with_unread(places)))
        self._mark_own_levels(places)
        return sorted(places, key=lambda p: p.order)

    def _with_unread(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """The ``places``, and those that no candidate shows; without dense FFNs that are parts of these."""
        unread, places = UnreadBlocks(self.tape, self.named), list(places)
        searches = (
            unread.by_structure, unread.by_stacks, unread.by_gate, unread.by_idle_lists, unread.by_tables,
            unread.by_computed_weights,
        )  # fmt: skip
        for search in searches:
            places += search(places)
        known = {w for p in places if p.kind == "moe" for w in p.weights}
        places += [p for p in normed_pairs(unread) if known.isdisjoint(p.weights)]
        places += single_products(unread, places)
        parts = {w for p in places if p.kind == "moe" and not p.candidates for w in p.weights}
        return [p for p in places if p.kind == "moe" or parts.isdisjoint(p.weights)]

    def _mark_own_levels(self, places: list[BlockCandidate]) -> None:
        """Up to the innermost call that holds a router: a choice, or a softmax; all where none does. A call that holds
        other experts too is no part of the block, but for those that its only choice sends the rows to as well: the
        projections into and out of an attention are one mixture's."""
        mixtures = [p for p in places if p.kind == "moe"]
        starts = sorted(p.call.first for p in mixtures)
        reading = Counter(w for p in mixtures for w in p.weights)
        chosen, choices = self._places_of(_ROUTES), self._places_of(_CHOICES)
        for place in places:
            holds = (_within(chosen, c) for c in place.levels)
            place.own = next((i + 1 for i, found in enumerate(holds) if found), len(place.levels))
        served = Counter(p.levels[p.own - 1].index for p in mixtures)
        for place in places:
            same = max((reading[w] for w in place.weights), default=1)  # the block itself, and where it stands twice
            home = place.levels[place.own - 1]
            if _within(choices, home) == 1:
                same = max(same, served[home.index])
                place.mixture = home.path if served[home.index] > 1 and not place.candidates else None
            wide = (_within(starts, c) > same for c in place.levels)
            place.apart = max(1, next((i for i, found in enumerate(wide) if found), len(place.levels)))
            place.own = min(place.own, place.apart)
        mark_steered(self.tape, places)

    def _places_of(self, ops: Collection[str]) -> list[int]:
        """Indices of the nodes that call one of ``ops``."""
        return [n.meta["index"] for n in self.tape.nodes if op_name(n) in ops]

    def _picked(self, free: Iterable[FFNCandidate]) -> list[list[FFNCandidate]]:
        """Chains that read rows picked by an index, and whose Parameters are named alike but for a number:
        experts that look like layers because each writes into the buffer that the next one reads from."""
        groups: dict[Any, list[FFNCandidate]] = {}
        for candidate in free:
            path = self.leaves[candidate.ins[0]][0]
            parts = path.split(".")
            for i in (i for i, p in enumerate(parts) if re.search(r"\d", p) and picks_rows(candidate.ins[0].operand)):
                alike = (i, *parts[:i], re.sub(r"\d+", "#", parts[i]), *parts[i + 1 :])
                groups.setdefault((alike, candidate.shape), []).append(candidate)
        found: list[list[FFNCandidate]] = []
        taken: set[FFNCandidate] = set()
        for key in sorted(groups, key=lambda k: -k[0][0]):  # the innermost number counts experts, not layers
            members = [c for c in groups[key] if c not in taken]
            if len(members) > 1:
                found.append(members)
                taken.update(members)
        return found

    def _place(self, kind: str, call: Call, group: list[FFNCandidate]) -> BlockCandidate:
        levels = [self.tape.calls[i] for i in reversed(self.tape.stack(call.index))]
        first = group[0].ins[0].matmul
        paths = {self.leaves[s][0] for c in group for s in (*c.ins, *c.outs)}
        weights = {id(self.named[p]) for p in paths if p in self.named}
        if kind == "moe":  # a helper that is handed its weights is called once per expert: the block is their owner
            owner = next((i for i, c in enumerate(levels) if not weights.isdisjoint(self._tensors(c.module))), 0)
            levels = levels[owner:]
            call = levels[0]
        ends = ([c.out.matmul for c in group], [c.ins[0].matmul for c in group])
        experts = max(
            len(set(map(identity_of, end))) for end in ends
        )  # a loop over the batch visits each several times
        if kind == "moe":
            rows = {self.leaves[c.out][0]: c.ins[0].operand for c in group}
            experts = counted_by_name(rows, self.named, self._twins, paths - {*rows}) or experts
        if kind == "moe" and experts == 1:  # one product of all
            experts = max([1, *(len_of_stack(c.out.matmul) for c in group)])
        return BlockCandidate(
            kind, call, levels, first.meta["index"], first.meta.get("source", ""), group, experts, weights
        )

    def _expert_groups(self, call: Call, free: list[FFNCandidate]) -> list[list[FFNCandidate]]:
        found = []
        taken: set[FFNCandidate] = set()
        for group in group_candidates(self.tape, free):
            members = [c for c in group if c not in taken]
            if not members or all(_only_chooses(c.out.node) for c in members):
                continue
            merged = members[0].merged or any(self.leaves[s][1] for c in members for s in (*c.ins, c.out))
            merged = merged or any(self._rest_is_idle(c) for c in members)
            alone = len({identity_of(c.out.matmul) for c in members}) < 2 and not self._share_the_last(call, members)
            if not merged and alone and not (self._dense(members[0]) and self._idle_twins(call, members[0])):
                continue
            if not merged and len(members) > 1 and not self._same_rows(members):
                continue
            if not self._enough(members) and not self._parts_of_one(call, members):
                continue
            found.append(members)
            taken.update(members)
        return found

    def _enough(self, members: list[FFNCandidate]) -> bool:
        """Shared in-sites are a layer before the experts, not experts of their own."""
        firsts = {c.ins[0] for c in members}
        return len(firsts) == len(members)

    def _share_the_last(self, call: Call, members: list[FFNCandidate]) -> bool:
        """Whether experts of a first matrix each share their second one, where something is chosen."""
        firsts = {identity_of(c.ins[0].matmul) for c in members}
        return len(firsts) == len(members) > 1 and self._chooses(call)

    def _parts_of_one(self, call: Call, members: list[FFNCandidate]) -> bool:
        """Whether one product computes the first layer of all experts, of which each takes its own part."""
        parts = {c.out.operand for c in members}
        cut = all(m.ins[0].matrices[0].m >= len(members) * m.out.matrices[0].k for m in members)
        return len(parts) == len(members) > 1 and cut and self._chooses(call)

    def _chooses(self, call: Call) -> bool:
        return any(op_name(n) in _ROUTES for n in self.tape.nodes[call.first : call.last])

    def _idle_twins(self, call: Call, candidate: FFNCandidate) -> bool:
        """Parameters of the call's module, named like the candidate's but for a number, that nothing used."""
        path = self.leaves[candidate.out][0]
        if path not in self.named or (call.path and not path.startswith(call.path + ".")):
            return False
        start = len(call.path.split(".")) if call.path else 0
        return any(key in self.idle for key in numbered_tensors(path, self.named[path]) if key[0] >= start)

    def _tensors(self, module: nn.Module) -> set[int]:
        """Identities of the module's tensors, those of its children included."""
        if module not in self._tensors_of:
            self._tensors_of[module] = {id(t) for t in (*module.parameters(), *module.buffers())}
        return self._tensors_of[module]

    def _rest_is_idle(self, candidate: FFNCandidate) -> bool:
        """Whether it reads rows picked by an index, and the numbers that nothing used of the Parameter that holds its
        matrix would hold another: experts in one flat Parameter, of which the example names this one."""
        path, matrix = self.leaves[candidate.out][0], candidate.out.matrices[0]
        if path not in self.named or not picks_rows(candidate.ins[0].operand):
            return False
        pieces = {identity_of(s.matmul): s.matrices[0] for s, (where, _) in self.leaves.items() if where == path}
        return self.named[path].numel() - sum(p.k * p.m for p in pieces.values()) >= matrix.k * matrix.m

    def _same_rows(self, members: list[FFNCandidate]) -> bool:
        """Their operands lead back to one tensor within a few steps: branches of one place, not of two towers. Where
        that is by sums of its rows (a gate for each task, before a tower for each), their results must meet as well."""
        common: set[fx.Node] | None = None
        summed: set[fx.Node] | None = None
        for candidate in members:
            sources = row_sources(candidate.ins[0].operand, through_sums=False)
            common = sources if common is None else common & sources
            sources = row_sources(candidate.ins[0].operand)
            summed = sources if summed is None else summed & sources
            if not summed:
                return False
        return bool(common) or results_meet(self.tape, [s.node for c in members for s in c.outs])

    def _dense(self, candidate: FFNCandidate) -> bool:
        inner = candidate.ins[0].matrices[0]
        outer = candidate.out.matrices[0]
        return candidate.nonlinear and len(candidate.ins) <= 2 and inner.k == outer.m and not candidate.merged

    def _feed_forward(self, candidate: FFNCandidate, blocks: set[int]) -> bool:
        """A dense FFN, and not a tied autoencoder (one weight, twice), nor a bottleneck (an adapter, squeeze-excite):
        plain and narrower inside than outside. Beside routed experts, in one of ``blocks``, narrow is usual."""
        inner, outer = candidate.ins[0].matrices[0], candidate.out.matrices[0]
        if not self._dense(candidate) or {m.path for s in candidate.ins for m in s.matrices} & {outer.path} - {""}:
            return False
        gated = len(candidate.ins) == 2 or inner.m == 2 * outer.k
        shared = not blocks.isdisjoint(self.tape.stack(self.home[candidate]))
        return gated or shared or outer.k >= inner.k


def _only_chooses(scores: fx.Node) -> bool:
    """Whether whatever reads ``scores``, moved, weighed or not, or their shares, is a choice among them: keys that
    a query meets."""
    stack, seen, chooses = [scores], {scores}, False
    while stack:
        for user in stack.pop().users:
            if op_name(user) in _CHOICES or op_name(user) in ("sort", "argsort"):
                chooses = True
            elif not (moves_rows(user) or is_pointwise(user) or op_name(user) in _SHARES) or len(seen) > 64:
                return False
            elif user not in seen:
                seen.add(user)
                stack.append(user)
    return chooses


def _within(indices: list[int], call: Call) -> int:
    """How many of the sorted ``indices`` of nodes lie in ``call``."""
    return bisect(indices, call.last - 1) - bisect(indices, call.first - 1)
