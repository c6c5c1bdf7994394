"""Places of blocks without FFN candidates: found by modules that ran side by side, by stacks, gates or tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import fx, nn

from moeopt.capture.op_kinds import GATES, gathers_chosen_rows, is_matmul, op_name, picks_rows
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Call, Tape
from moeopt.capture.tree import leaves_of
from moeopt.find.block_candidates import BlockCandidate, layers_of
from moeopt.find.light_sites import leaf_of
from moeopt.find.module_lists import alike_lists, feed_forward_lists, gate_width, made_by
from moeopt.find.parallel_lists import are_layers, called_by_layers, one_mixture
from moeopt.find.row_branches import weighed_branches
from moeopt.recognise.gemm_site import is_weight
from moeopt.value_types import FxArg

_IDLE = (
    "none of its {} experts ran on the example inputs: no row was sent to one, so what they compute was not seen; give "
    "example inputs whose rows reach experts, real ones rather than random numbers"
)
_GATES = (*GATES, "topk")
_LOOKUPS = ("embedding", "_embedding_bag", "index", "index_select")


class UnreadBlocks:
    """Searches for blocks whose experts no FFN candidate shows; each leaves out the calls of the places given to it.

    Args:
        named: Parameters and buffers of the model by name.
    """

    def __init__(self, tape: Tape, named: Mapping[str, torch.Tensor]) -> None:
        self.tape, self.named = tape, named
        self._children: dict[int, list[Call]] = {}  # the calls that each call makes itself, by its index
        for call in tape.calls:
            if call.parent is not None:
                self._children.setdefault(call.parent, []).append(call)

    def children(self, call: Call) -> list[Call]:
        """The calls that ``call`` makes itself."""
        return self._children.get(call.index, [])

    def by_structure(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls that run alike feed-forward children side by side where no FFN candidate was found inside any; or that
        ran some of them, on rows picked for them, and others not at all."""
        found = []
        taken = calls_of_blocks(places)
        for call in self.tape.calls:
            children = self.children(call)
            children = children + called_by_layers(call, children)
            if not children or call.index in taken:
                continue
            for ran, experts in self._experts_among(call, children):
                found.append(self.place(call, ran[0].first, experts, weights_of(ran)))
        return found

    def _experts_among(self, call: Call, children: list[Call]) -> list[tuple[list[Call], int]]:
        """For each mixture among the ``children`` of ``call`` its experts' calls, or those of their layers, and how
        many experts there are, those that did not run included."""
        lists, pairs = alike_lists(call.module), feed_forward_lists(call.module)
        unequal = not lists
        if unequal:  # of several sizes: rows that are picked for each, or a weight on each, must tell
            lists = alike_lists(call.module, same_sizes=False)
        ran = [c for c in children if any(c.module in one for one in lists)]
        idle = sum(map(len, lists)) - len({id(c.module) for c in ran})
        picked = sum(any(picks_rows(a) or gathers_chosen_rows(a) for a in leaves_of(fx.Node, c.args)) for c in ran)
        routed = picked > 1 or (picked == 1 and idle > 0)
        weighed = not routed and not pairs and len(ran) > 1 and weighed_branches(self.tape, ran, same_sizes=not unequal)
        if not routed and not weighed:
            lists = [one & pairs for one in lists]
        return self._side_by_side(ran, lists, routed, call.first)

    def _side_by_side(
        self, ran: list[Call], lists: list[set[nn.Module]], routed: bool, start: int
    ) -> list[tuple[list[Call], int]]:
        """The calls of the lists that do not run one behind the other, lists of one mixture together, and how many
        experts each has. ``start``: index of the first node of the module that runs them."""
        found: list[list[list[Call]]] = []
        for one in lists:
            own = [c for c in ran if c.module in one]
            if not own or (len(own) == 1 and not routed) or (len(own) > 1 and self.sequential(own)):
                continue
            mixture = next((m for m in found if one_mixture(m[0], own, routed, start)), None)
            if mixture is None:
                found.append([own])
            else:
                mixture.append(own)
        sizes = {id(c.module): len(one) for one in lists for c in ran if c.module in one}
        counted = []
        for mixture in found:
            each = [sizes[id(own[0].module)] if routed else len({id(c.module) for c in own}) for own in mixture]
            layers = len(mixture) > 1 and (are_layers(*mixture[:2]) or are_layers(*mixture[1::-1]))
            calls = sorted((c for own in mixture for c in own), key=lambda c: c.first)
            counted.append((calls, max(each) if layers else sum(each)))
        return sorted(counted, key=lambda m: m[0][0].first)

    def by_stacks(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls of modules that own stacks of experts, and a router's weight beside them, without an FFN candidate.

        A router's weight has the number of experts and a size of theirs; stacks of an attention's heads have none.
        """
        found: list[BlockCandidate] = []
        lone = [p for p in places if p.experts == len(p.candidates) == 1]  # from one block into the next, perhaps
        known = {i for p in places if p not in lone for i in p.weights}
        taken = calls_of_blocks(places)
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
            found.append(self.place(call, call.first, experts, set(map(id, stacks))))
        return found

    def by_gate(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls that choose among, or weigh, as many things as they run alike modules side by side that are more than
        one matrix each, or as convolutions have groups: mixtures of other layers than matmuls."""
        return self._gated(places, _GATES, 2)

    def by_choice(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """The same of modules of one matrix or one kernel each, if a top-k chooses among them: heads, towers and
        projections are only weighed."""
        return self._gated(places, ("topk",), 1)

    def _gated(self, places: list[BlockCandidate], by: tuple[str, ...], layers: int) -> list[BlockCandidate]:
        found: list[BlockCandidate] = []
        taken = calls_of_blocks(places)
        gates, convolutions = self._gates_and_convolutions()
        for call in reversed(self.tape.calls) if gates else ():
            children = self.children(call)
            inner = [c for child in children for c in self.children(child)]
            near = [n for c in (call, *children, *inner) for n in gates.get(c.index, []) if op_name(n) in by]
            if call.index in taken or not near:
                continue
            block = self._gated_modules(call, children, near, layers) or self._gated_groups(
                call, convolutions.get(call.index, []), near
            )
            if block is not None:
                found.append(block)
                taken |= set(self.tape.stack(call.index))
        return found

    def _gated_modules(
        self, call: Call, children: list[Call], gates: list[fx.Node], layers: int
    ) -> BlockCandidate | None:
        """Alike ``children`` side by side, as many as one of the ``gates`` outside them is wide."""
        lists = alike_lists(call.module)
        for alike in (set().union(*lists), *lists) if len(lists) > 1 else lists:
            ran = [c for c in children if c.module in alike and (layers_of(c.module) >= layers or self._of_two_rows(c))]
            inside = {i for c in ran for i in range(c.first, c.last)}
            widths = {gate_width(n) for n in gates if n.meta["index"] not in inside}
            if len({id(c.module) for c in ran}) in widths - {0, 1} and not self.sequential(ran):
                return self.place(call, ran[0].first, len(ran), weights_of(ran))
        return None

    def _of_two_rows(self, call: Call) -> bool:
        """Whether a call multiplies two rows with each other through its weight, as no head or projection does."""
        return any(op_name(n) == "_trilinear" for n in self.tape.nodes[call.first : call.last])

    def _gated_groups(self, call: Call, convolutions: list[fx.Node], gates: list[fx.Node]) -> BlockCandidate | None:
        """Several convolutions with as many groups as one of the ``gates`` chooses among."""
        if len(convolutions) < 2 or convolutions[0].args[8] not in {
            gate_width(n) for n in gates if op_name(n) != "sigmoid"
        }:
            return None
        weights = {id(self.named[p]) for p in map(self._path, convolutions) if p in self.named}
        return self.place(call, convolutions[0].meta["index"], int(convolutions[0].args[8]), weights)  # type: ignore[arg-type]

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

    def by_idle_lists(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls whose module holds alike modules that no call ran, and chooses among, or weighs, as many things: no row
        of the example inputs reached an expert."""
        ran = {id(c.module) for c in self.tape.calls}
        taken = calls_of_blocks(places)
        gates, _ = self._gates_and_convolutions()
        found: list[BlockCandidate] = []
        for call in self.tape.calls:
            idle = [
                one for one in alike_lists(call.module) if ran.isdisjoint({id(m) for e in one for m in e.modules()})
            ]
            if call.index in taken or not idle:
                continue
            near = [call, *self.children(call)]
            near += [inner for child in near[1:] for inner in self.children(child)]
            widths = {gate_width(n) for c in near for n in gates.get(c.index, []) if self._weighs(n)}
            for one in idle:
                if len(one) in widths and all(layers_of(m) > 1 for m in one):
                    place = self.place(call, call.first, len(one), {id(p) for m in one for p in m.parameters()})
                    found.append(dataclasses.replace(place, reason=_IDLE.format(len(one))))
        return found

    def _weighs(self, gate: fx.Node) -> bool:
        """Whether a weight as wide as the ``gate`` is among what it is computed of."""
        named = {str(n.target) for n in ancestors([gate]) if n.op == "get_attr"} & self.named.keys()
        return gate_width(gate) in {size for name in named for size in self.named[name].shape}

    def by_tables(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls that look up the same top-k ids in two tables: experts of one neuron each; or in one, whose rows they
        weigh and add up: a memory."""
        lookups: dict[fx.Node, list[fx.Node]] = {}
        matrices = set[fx.Node]()  # choices that look up matrices too: their rows are these matrices' biases
        for node in self.tape.nodes:
            table: FxArg = node.args[0] if op_name(node).removesuffix("_forward_only") in _LOOKUPS else None
            if not isinstance(table, fx.Node) or table.op != "get_attr" or len(node.all_input_nodes) < 2:
                continue
            choice = made_by(node.all_input_nodes[1], ("topk", "sort"))
            if choice is not None and len(table.meta["shape"]) == 2:
                lookups.setdefault(choice, []).append(node)
            elif choice is not None:
                matrices.add(choice)
        found = []
        taken = calls_of_blocks(places)
        for choice, nodes in lookups.items():
            tables, bags = {n.args[0] for n in nodes}, op_name(nodes[0]).startswith("_embedding_bag")
            several = bags or len(tables) > 1 or len(nodes[0].meta["shape"]) > 2
            if choice in matrices or not several or (len(tables) < 2 and op_name(nodes[0]).startswith("index")):
                continue
            home = self.tape.call_of(nodes[0])
            call = home if home.parent is None else self.tape.calls[home.parent]
            if call.index not in taken:
                paths = [leaf_of(self.tape, n)[0] for n in nodes]
                weights = {id(self.named[p]) for p in paths if p in self.named}
                found.append(self.place(call, nodes[0].meta["index"], nodes[0].args[0].meta["shape"][0], weights))  # type: ignore[union-attr]
        return found

    def by_computed_weights(self, places: list[BlockCandidate]) -> list[BlockCandidate]:
        """Calls that multiply rows picked for them by matrices computed of Parameters alone, in a way that no reading
        follows: experts that a parametrisation, a table or another library's op expands at each call."""
        products: dict[int, list[fx.Node]] = {}
        data, memo = set[fx.Node](), dict[fx.Node, bool]()
        for node in self.tape.nodes:
            if node.op == "placeholder" or any(a in data for a in node.all_input_nodes):
                data.add(node)
            if is_matmul(node):
                weights = [a for a in node.all_input_nodes if a not in data and not is_weight(a, memo)]
                rows = [a for a in node.all_input_nodes if a in data]
                if weights and len(rows) == 1 and picks_rows(rows[0]):
                    products.setdefault(node.meta["call"], []).append(weights[-1])
        found, taken = [], calls_of_blocks(places)
        for index, weights in products.items():
            before = sorted(ancestors(weights), key=lambda n: n.meta["index"])
            stacks = [n.meta["shape"][0] for n in before if len(n.meta.get("shape") or ()) == 3]
            if index in taken or len(weights) < 2 or not stacks:
                continue
            held = {id(self.named[str(n.target)]) for n in before if n.op == "get_attr" and str(n.target) in self.named}
            experts = max(set(stacks), key=stacks.count)
            found.append(self.place(self.tape.calls[index], before[0].meta["index"], experts, held))
        return found

    def _path(self, convolution: fx.Node) -> str:
        weight = convolution.args[1]
        return leaf_of(self.tape, weight)[0] if isinstance(weight, fx.Node) else ""

    def place(self, call: Call, first: int, experts: int, weights: set[int]) -> BlockCandidate:
        """A place without candidates, whose experts run from node ``first`` on."""
        levels = [self.tape.calls[i] for i in reversed(self.tape.stack(call.index))]
        source = next((n.meta["source"] for n in self.tape.nodes[first:] if n.meta.get("source")), "")
        return BlockCandidate("moe", call, levels, first, source, [], experts, weights)

    def sequential(self, ran: list[Call]) -> bool:
        """True where one of the calls reads, by any way, what an earlier one returned."""
        first = set(leaves_of(fx.Node, ran[0].output))
        wanted = set(leaves_of(fx.Node, [ran[-1].args, ran[-1].kwargs]))
        return bool(first & ancestors(wanted))


def calls_of_blocks(places: list[BlockCandidate]) -> set[int]:
    """Indices of the calls around the experts of ``places``."""
    return {c.index for p in places if p.kind == "moe" for c in p.levels}


def weights_of(calls: list[Call]) -> set[int]:
    """Identities of the Parameters of the modules that were called; of their buffers where these are all they have."""
    found = {id(p) for c in calls for p in c.module.parameters()}
    return found or {id(b) for c in calls for b in c.module.buffers()}
