"""Places worth a look in a whole model: which module calls hold parallel experts, which a dense FFN.

The model runs once on the tape without values. FFN candidates (matmul, element-wise function, matmul)
that stand side by side on the same rows are experts; one whose weight is a slice of a stack or of a flat
Parameter, or has idle twins, is an expert whose siblings were not hit; a lone one is a dense FFN. A place is only
a hint: what a block computes is decided by its own probe call.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from moeopt.capture.op_kinds import is_factory, is_matmul, is_pointwise, moves_rows, op_name, picks_rows
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Call, Tape, record
from moeopt.capture.tree import leaves_of
from moeopt.capture.unregistered import is_registered, registered, unregistered
from moeopt.find.row_branches import weighed_branches
from moeopt.ir.weight_refs import MatrixRef
from moeopt.recognise.ffn_candidates import FFNCandidate, find_candidates, group_candidates
from moeopt.recognise.gemm_sites import GemmSite, is_computed_weight, is_weight, weight_and_operand

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


@dataclass
class BlockCandidate:
    """One module call that holds a block. ``levels`` are the call and its ancestors, innermost first.

    ``alone`` has each FFN candidate of an MoE block that is a dense FFN where it turns out to be no expert: a shared
    expert of the experts' own size. ``own`` is how many of the levels are the block's own: up to the innermost in
    which something is chosen. ``reason`` is why nothing of it can be rewritten, where that is known already;
    ``steered`` whether its Python depends on the values of tensors.
    """

    kind: str
    call: Call
    levels: list[Call]
    order: int
    source: str
    candidates: list[FFNCandidate] = field(default_factory=list)
    experts: int | None = None
    weights: set[int] = field(default_factory=set)
    alone: list[BlockCandidate] = field(default_factory=list)
    own: int = 0
    reason: str = ""
    steered: bool = False

    def own_levels(self) -> set[str]:
        """Paths of the levels that are the block's own."""
        return {level.path for level in self.levels[: self.own]}


def discover(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[BlockCandidate]:
    """Every MoE candidate and dense FFN of one run, in execution order.

    Raises:
        CaptureError: the model does not run on these inputs.
    """
    held = unregistered(model)
    with registered(model, held):
        tape = record(model, args, kwargs, keep_values=False, lenient=True)
        sites, leaves = _light_sites(tape)
        candidates = find_candidates(tape, sites, loose=True)
        places = _Finder(tape, candidates, leaves).run()
    for one in held:
        hidden = {id(t) for t in one.tensors}
        for place in (q for p in places for q in (p, *p.alone) if q.weights & hidden and not q.reason):
            place.levels = [level for level in place.levels if is_registered(level.path)]
            place.call, place.reason = place.levels[0], one.reason
    return places


def alike_children(module: nn.Module) -> set[nn.Module]:
    """Children of the module's lists that hold matrices of the same shapes."""
    found: set[nn.Module] = set()
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1:
            shapes = [
                sorted(str(t.shape) for t in (*m.parameters(), *m.buffers()) if t.dim() > 1) for m in child.children()
            ]
            if shapes[0] and all(s == shapes[0] for s in shapes):
                found.update(child.children())
    return found


def feed_forward_lists(module: nn.Module) -> set[nn.Module]:
    """Children of the module's lists that look alike and hold a pair of matrices (a, b) and (b, a)."""
    found: set[nn.Module] = set()
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1:
            shapes = [sorted(tuple(p.shape) for p in m.parameters() if p.dim() == 2) for m in child.children()]
            pair = shapes and any(s[::-1] in shapes[0] for s in shapes[0])
            if pair and 2 <= len(shapes[0]) <= 3 and all(s == shapes[0] for s in shapes):
                found.update(child.children())
    return found


def _light_sites(tape: Tape) -> tuple[list[GemmSite], dict[GemmSite, tuple[str, bool]]]:
    """Sites by shape alone; with each, (Parameter path, whether the weight is one slice of a stack)."""
    memo: dict[fx.Node, bool] = {}
    sites, leaves = [], {}
    for node in tape.nodes:
        if is_computed_weight(node, memo):
            memo[node] = True
        if not is_matmul(node):
            continue
        found = weight_and_operand(node, memo)
        if found is None:
            continue
        weight, operand, left = found
        shape = weight.meta["shape"]
        if op_name(node) == "convolution":
            if any(s != 1 for s in shape[2:]):
                continue
            m, k, count = shape[0], shape[1], 1
        elif op_name(node) == "linear":
            m, k, count = shape[0], shape[1], 1
        else:
            k, m = (shape[-1], shape[-2]) if left else (shape[-2], shape[-1])
            count = shape[0] if len(shape) == 3 else 1
        if not k or not m:
            continue
        path, leaf = _leaf(tape, weight)
        matrices = [MatrixRef(path, (i,), (), (), k, m) for i in range(min(count, 2))]
        site = GemmSite(_biased(node, memo), node, operand, 0, 0, matrices, torch.zeros(0, dtype=torch.long))
        sites.append(site)
        sliced = leaf is not None and leaf.dim() >= 3 and len(leaf) > 1 and op_name(node) != "convolution"
        leaves[site] = (path, sliced and (len(shape) == 2 or shape[0] == 1))
    return sites, leaves


def _leaf(tape: Tape, node: fx.Node) -> tuple[str, torch.Tensor | None]:
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.op != "get_attr" or "constant" in node.meta:
        return "", None
    path = str(node.target)
    owner, _, name = path.rpartition(".")
    return path, getattr(tape.root.get_submodule(owner), name)


def _biased(node: fx.Node, memo: dict[fx.Node, bool]) -> fx.Node:
    """The ``add`` of a bias that alone reads the matmul, else the matmul."""
    current = node
    for _ in range(3):
        users = [u for u in current.users if "index" in u.meta]
        if len(users) != 1:
            return node
        user = users[0]
        if op_name(user) == "add":
            others = [a for a in user.args if a is not current]
            return user if len(others) == 1 and isinstance(others[0], fx.Node) and is_weight(others[0], memo) else node
        if op_name(user) not in ("view", "_unsafe_view", "squeeze", "unsqueeze", "reshape"):
            return node
        current = user
    return node


class _Finder:
    def __init__(self, tape: Tape, candidates: list[FFNCandidate], leaves: dict[GemmSite, tuple[str, bool]]) -> None:
        self.tape, self.candidates, self.leaves = tape, candidates, leaves
        self.home = {c: self._common([*c.outs, *c.ins]) for c in candidates}
        self.named = {**dict(tape.root.named_parameters(remove_duplicate=False)), **dict(tape.root.named_buffers())}
        used = {path for path, _ in leaves.values()}
        self.idle = {key for name, t in self.named.items() if name not in used for key in _numbered(name, t)}
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
        places = _closest(places)
        places += self._by_structure(places)
        places += self._by_stacks(places)
        places += self._by_gate(places)
        places += self._by_tables(places)
        places = _once(places)
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

    def _by_structure(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls that run alike feed-forward children side by side where no FFN candidate was found inside any; or that
        ran some of them, on rows picked for them, and others not at all."""
        found = []
        children: dict[int, list[Call]] = {}
        for call in self.tape.calls:
            if call.parent is not None:
                children.setdefault(call.parent, []).append(call)
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
        convolutions: dict[int, list[fx.Node]] = {}
        gates: dict[int, list[fx.Node]] = {}
        for node in self.tape.nodes:
            if op_name(node) in _GATES:
                gates.setdefault(node.meta["call"], []).append(node)
            elif op_name(node) == "convolution" and node.args[8] != 1 and node.args[1].meta["shape"][1] > 1:  # type: ignore[union-attr]
                home = self.tape.call_of(node)
                convolutions.setdefault(home.index if home.parent is None else home.parent, []).append(node)
        children: dict[int, list[Call]] = {}
        for call in self.tape.calls:
            if call.parent is not None:
                children.setdefault(call.parent, []).append(call)
        for call in reversed(self.tape.calls) if gates else ():
            own = children.get(call.index, [])
            near = [n for c in (call, *own) for n in gates.get(c.index, [])]
            if call.index in taken or not near:
                continue
            alike, groups = alike_children(call.module), convolutions.get(call.index, [])
            ran = [c for c in own if c.module in alike and _layers(c.module) > 1]
            widths = {_gate_width(n) for n in near if self.tape.call_of(n).module not in alike}
            choices = {_gate_width(n) for n in near if op_name(n) != "sigmoid"}
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
                paths = [_leaf(self.tape, n)[0] for n in nodes]
                weights = {id(self.named[p]) for p in paths if p in self.named}
                found.append(self._unread(call, nodes[0].meta["index"], nodes[0].args[0].meta["shape"][0], weights))  # type: ignore[union-attr]
        return found

    def _path(self, convolution: fx.Node) -> str:
        weight = convolution.args[1]
        return _leaf(self.tape, weight)[0] if isinstance(weight, fx.Node) else ""

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
        experts = len({_identity(c.out.matmul) for c in group})  # a loop over the batch visits each several times
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
            alone = len({_identity(c.out.matmul) for c in members}) < 2
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
        return any(key in self.idle for key in _numbered(path, self.named[path]) if key[0] >= start)

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
        pieces = {_identity(s.matmul): s.matrices[0] for s, (where, _) in self.leaves.items() if where == path}
        return self.named[path].numel() - sum(p.k * p.m for p in pieces.values()) >= matrix.k * matrix.m

    def _same_rows(self, members: list[FFNCandidate]) -> bool:
        """Their operands lead back to one tensor within a few steps: branches of one place, not of two towers."""
        common: set[fx.Node] | None = None
        for candidate in members:
            sources = _row_sources(candidate.ins[0].operand)
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


def _numbered(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, str, torch.Size]]:
    """For each part of a tensor's name that holds a number: the part's place, the name without the number, the shape.
    Tensors that have one in common are twins."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if re.search(r"\d", part):
            yield i, ".".join([*parts[:i], re.sub(r"\d+", "#", part), *parts[i + 1 :]]), tensor.shape


def _gate_width(node: fx.Node) -> int:
    """Over how many things a softmax, sigmoid or top-k is."""
    shape = node.args[0].meta.get("shape") if isinstance(node.args[0], fx.Node) else None
    return int(shape[-1]) if shape else 0


def _layers(module: nn.Module) -> int:
    return sum(p.dim() > 1 for p in module.parameters())


def _closest(places: list[BlockCandidate]) -> list[BlockCandidate]:
    """The places without those whose experts were found closer too, in a call inside theirs."""
    readers: dict[int, list[BlockCandidate]] = {}
    for place in places:
        for weight in place.weights if place.kind == "moe" else ():
            readers.setdefault(weight, []).append(place)

    def closer(place: BlockCandidate) -> bool:
        others = {id(o): o for w in place.weights for o in readers[w] if o.call is not place.call}
        return any(place.call is level for o in others.values() for level in o.levels)

    return [p for p in places if p.kind != "moe" or not closer(p)]


def _once(places: list[BlockCandidate]) -> list[BlockCandidate]:
    """The places without second readings of one call that share weights (three matmuls in a row are two candidates)."""
    seen: dict[int, set[int]] = {}
    found = []
    for place in places:
        weights = seen.setdefault(place.call.index, set()) if place.kind == "moe" else set()
        if weights.isdisjoint(place.weights):
            found.append(place)
        weights |= place.weights
    return found


def _identity(product: fx.Node) -> tuple[Any, ...]:
    """Which part of which Parameter a matmul multiplies by: its name and the slicing that leads to it."""
    found = weight_and_operand(product, {})
    steps: list[Any] = []
    node = found[0] if found is not None else product
    while node.op == "call_function" and node.all_input_nodes:
        steps.append((str(node.target), repr([a for a in node.args if not isinstance(a, fx.Node)])))
        node = node.all_input_nodes[0]
    return (str(node.target), *steps)


def _row_sources(start: fx.Node, steps: int = 40) -> set[fx.Node]:
    """Tensors that the rows of ``start`` were moved from, through movement and a few other ops."""
    seen: set[fx.Node] = set()
    stack = [(start, 3)]
    while stack and len(seen) < steps:
        node, budget = stack.pop()
        if node in seen or node.op == "get_attr" or is_factory(node):
            continue
        seen.add(node)
        if node.op == "placeholder":
            continue
        spent = 0 if moves_rows(node) else 1
        if budget - spent < 0:
            continue
        inputs = node.all_input_nodes if is_pointwise(node) or spent else node.all_input_nodes[:1]
        stack.extend((a, budget - spent) for a in inputs)
    return seen
