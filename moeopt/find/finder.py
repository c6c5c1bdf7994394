"""Places of blocks among the feed-forward candidates of a model: by structure, by a gate or by a table."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from moeopt.capture.op_kinds import op_name, picks_rows
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Call, Tape
from moeopt.capture.tree import leaves_of
from moeopt.find.block_candidates import BlockCandidate, closest, each_once, identity_of, layers_of, numbered_tensors
from moeopt.find.light_sites import leaf_of
from moeopt.find.module_lists import alike_children, feed_forward_lists, gate_width, row_sources
from moeopt.find.row_branches import weighed_branches
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


_SHAPED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "_local_scalar_dense")


_GATES = ("_softmax", "softmax", "sigmoid", "topk")


class Finder:
    def __init__(self, tape: Tape, candidates: list[FFNCandidate], leaves: dict[GemmSite, tuple[str, bool]]) -> None:
        self.tape, self.candidates, self.leaves = tape, candidates, leaves
        self.home = {c: self._common([*c.outs, *c.ins]) for c in candidates}
        self.named = {**dict(tape.root.named_parameters(remove_duplicate=False)), **dict(tape.root.named_buffers())}
        used = {path for path, _ in leaves.values()}
        self.idle = {key for name, t in self.named.items() if name not in used for key in numbered_tensors(name, t)}
        self._tensors_of: dict[nn.Module, set[int]] = {}

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
        places += self._by_structure(places)
        places += self._by_stacks(places)
        places += self._by_gate(places)
        places += self._by_tables(places)
        places = each_once(places)
        self._mark_own_levels(places)
        return sorted(places, key=lambda p: p.order)

    def _mark_own_levels(self, places: list[BlockCandidate]) -> None:
        """Up to the innermost call that holds a router: a choice, or a softmax; all where none does."""
        chosen = [n.meta["index"] for n in self.tape.nodes if op_name(n) in _ROUTES]
        for place in places:
            holds = (bisect(chosen, c.last - 1) > bisect(chosen, c.first - 1) for c in place.levels)
            place.own = next((i + 1 for i, found in enumerate(holds) if found), len(place.levels))
            whole = place.levels[max(place.own, 1) - 1]
            inside = self.tape.nodes[whole.first : whole.last]
            reads = (whole.index in self.tape.stack(r.call) for r in self.tape.reads)
            place.steered = any(op_name(n) in _SHAPED_BY_VALUES for n in inside) or any(reads)

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

    def _children(self) -> dict[int, list[Call]]:
        """The calls that each call makes itself, by its index."""
        children: dict[int, list[Call]] = {}
        for call in self.tape.calls:
            if call.parent is not None:
                children.setdefault(call.parent, []).append(call)
        return children

    def _gates_and_convolutions(self) -> tuple[dict[int, list[fx.Node]], dict[int, list[fx.Node]]]:
        """Gates by the call that they stand in, and convolutions with groups by the call around their module's."""
        convolutions: dict[int, list[fx.Node]] = {}
        gates: dict[int, list[fx.Node]] = {}
        for node in self.tape.nodes:
            if op_name(node) in _GATES:
                gates.setdefault(node.meta["call"], []).append(node)
            elif op_name(node) == "convolution" and node.args[8] != 1 and node.args[1].meta["shape"][1] > 1:  # type: ignore[union-attr]
                home = self.tape.call_of(node)
                convolutions.setdefault(home.index if home.parent is None else home.parent, []).append(node)
        return gates, convolutions

    def _by_structure(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls that run alike feed-forward children side by side where no FFN candidate was found inside any; or that
        ran some of them, on rows picked for them, and others not at all."""
        found = []
        children = self._children()
        taken = {c.index for p in places if p.kind == "moe" for c in p.levels}
        for call in self.tape.calls:
            ran = children.get(call.index, [])
            if not ran or call.index in taken:
                continue
            alike, pairs = alike_children(call.module), feed_forward_lists(call.module)
            ran = [c for c in ran if c.module in alike]
            idle = len(alike) - len({id(c.module) for c in ran})
            picked = sum(any(picks_rows(a) for a in leaves_of(fx.Node, c.args)) for c in ran)
            routed = picked > 1 or (picked == 1 and idle > 0)
            weighed = not routed and not pairs and len(ran) > 1 and weighed_branches(self.tape, ran)
            ran = [c for c in ran if routed or weighed or c.module in pairs]
            if not ran or (len(ran) < 2 and not routed) or (len(ran) > 1 and self._sequential(ran)):
                continue
            weights = {id(p) for c in ran for p in c.module.parameters()}
            experts = len({id(c.module) for c in ran}) + (idle if routed else 0)
            found.append(self._unread(call, ran[0].first, experts, weights))
        return found

    def _by_stacks(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls of modules that own stacks of experts, and a router's weight beside them, without an FFN candidate.

        A router's weight has the number of experts and a size of theirs; stacks of an attention's heads have none.
        """
        found: list[BlockCandidate] = []
        known = {i for p in places for i in p.weights}
        taken = {c.index for p in places if p.kind == "moe" for c in p.levels}
        for call in self.tape.calls:
            stacks = [p for p in call.module._parameters.values() if p is not None and p.dim() == 3 and len(p) > 1]
            stacks = [p for p in stacks if id(p) not in known and len(p) == len(stacks[0])]
            if len(stacks) < 2 or call.index in taken:
                continue
            experts, sizes = len(stacks[0]), set(stacks[0].shape[1:]) & set(stacks[1].shape[1:])
            near = call.module if call.parent is None else self.tape.calls[call.parent].module
            routers = {frozenset((experts, size)) for size in sizes}
            if not any(p.dim() == 2 and set(p.shape) in routers for p in near.parameters()):
                continue
            known |= set(map(id, stacks))
            found.append(self._unread(call, call.first, experts, set(map(id, stacks))))
        return found

    def _by_gate(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls that choose among, or weigh, as many things as they run alike modules side by side that are more than
        one matrix each, or as convolutions have groups: mixtures of other layers than matmuls."""
        found: list[BlockCandidate] = []
        taken = {c.index for p in places if p.kind == "moe" for c in p.levels}
        gates, convolutions = self._gates_and_convolutions()
        children = self._children()
        for call in reversed(self.tape.calls) if gates else ():
            own = children.get(call.index, [])
            near = [n for c in (call, *own) for n in gates.get(c.index, [])]
            if call.index in taken or not near:
                continue
            alike, groups = alike_children(call.module), convolutions.get(call.index, [])
            ran = [c for c in own if c.module in alike and layers_of(c.module) > 1]
            widths = {gate_width(n) for n in near if self.tape.call_of(n).module not in alike}
            choices = {gate_width(n) for n in near if op_name(n) != "sigmoid"}
            if len({id(c.module) for c in ran}) in widths - {0, 1} and not self._sequential(ran):
                weights = {id(p) for c in ran for p in c.module.parameters()}
                found.append(self._unread(call, ran[0].first, len(ran), weights))
            elif len(groups) > 1 and groups[0].args[8] in choices:
                weights = {id(self.named[p]) for p in map(self._path, groups) if p in self.named}
                found.append(self._unread(call, groups[0].meta["index"], int(groups[0].args[8]), weights))  # type: ignore[arg-type]
            else:
                continue
            taken |= set(self.tape.stack(call.index))
        return found

    def _by_tables(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls that look up the same top-k ids in two tables: experts of one neuron each."""
        lookups: dict[Any, list[fx.Node]] = {}
        for node in self.tape.nodes:
            if op_name(node) == "embedding" and len(node.meta["shape"]) > 2 and node.args[0].op == "get_attr":  # type: ignore[union-attr]
                lookups.setdefault(node.args[1], []).append(node)
        found = []
        taken = {c.index for p in places if p.kind == "moe" for c in p.levels}
        for ids, nodes in lookups.items():
            if len({n.args[0] for n in nodes}) < 2 or not any(op_name(n) == "topk" for n in ancestors([ids])):
                continue
            home = self.tape.call_of(nodes[0])
            call = home if home.parent is None else self.tape.calls[home.parent]
            if call.index not in taken:
                paths = [leaf_of(self.tape, n)[0] for n in nodes]
                weights = {id(self.named[p]) for p in paths if p in self.named}
                found.append(self._unread(call, nodes[0].meta["index"], nodes[0].args[0].meta["shape"][0], weights))  # type: ignore[union-attr]
        return found

    def _path(self, convolution: fx.Node) -> str:
        weight = convolution.args[1]
        return leaf_of(self.tape, weight)[0] if isinstance(weight, fx.Node) else ""

    def _unread(self, call: Call, first: int, experts: int, weights: set[int]) -> BlockCandidate:
        """A place without candidates, whose experts run from node ``first`` on."""
        levels = [self.tape.calls[i] for i in reversed(self.tape.stack(call.index))]
        source = next((n.meta["source"] for n in self.tape.nodes[first:] if n.meta.get("source")), "")
        return BlockCandidate("moe", call, levels, first, source, [], experts, weights)

    def _sequential(self, ran: list[Call]) -> bool:
        """True where one of the calls reads, by any way, what an earlier one returned."""
        first = set(leaves_of(fx.Node, ran[0].output))
        wanted = set(leaves_of(fx.Node, [ran[-1].args, ran[-1].kwargs]))
        return bool(first & ancestors(wanted))

    def _place(self, kind: str, call: Call, group: list[FFNCandidate]) -> BlockCandidate:
        levels = [self.tape.calls[i] for i in reversed(self.tape.stack(call.index))]
        first = group[0].ins[0].matmul
        paths = {self.leaves[s][0] for c in group for s in (*c.ins, *c.outs)}
        weights = {id(self.named[p]) for p in paths if p in self.named}
        if kind == "moe":  # a helper that is handed its weights is called once per expert: the block is their owner
            owner = next((i for i, c in enumerate(levels) if not weights.isdisjoint(self._tensors(c.module))), 0)
            levels = levels[owner:]
            call = levels[0]
        experts = len({identity_of(c.out.matmul) for c in group})  # a loop over the batch visits each several times
        return BlockCandidate(
            kind, call, levels, first.meta["index"], first.meta.get("source", ""), group, experts, weights
        )

    def _expert_groups(self, call: Call, free: list[FFNCandidate]) -> list[list[FFNCandidate]]:
        found = []
        taken: set[FFNCandidate] = set()
        for group in group_candidates(self.tape, free):
            members = [c for c in group if c not in taken]
            if not members:
                continue
            merged = members[0].merged or any(self.leaves[s][1] for c in members for s in (*c.ins, c.out))
            merged = merged or any(self._rest_is_idle(c) for c in members)
            alone = len({identity_of(c.out.matmul) for c in members}) < 2
            if not merged and alone and not (self._dense(members[0]) and self._idle_twins(call, members[0])):
                continue
            if not merged and len(members) > 1 and not self._same_rows(members):
                continue
            if not self._enough(members):
                continue
            found.append(members)
            taken.update(members)
        return found

    def _enough(self, members: list[FFNCandidate]) -> bool:
        """Shared in-sites are a layer before the experts, not experts of their own."""
        firsts = {c.ins[0] for c in members}
        return len(firsts) == len(members)

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
        """Their operands lead back to one tensor within a few steps: branches of one place, not of two towers."""
        common: set[fx.Node] | None = None
        for candidate in members:
            sources = row_sources(candidate.ins[0].operand)
            common = sources if common is None else common & sources
            if not common:
                return False
        return True

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
