"""A place in a model where a block may be, and which of several places for one block is kept."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from moeopt.capture.op_kinds import is_pointwise, op_name, picks_rows
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Call
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.gemm_sites import weight_and_operand


@dataclass
class BlockCandidate:
    """One module call that holds a block. ``levels`` are the call and its ancestors, innermost first.

    ``alone`` has each FFN candidate of an MoE block that is a dense FFN where it turns out to be no expert: a shared
    expert of the experts' own size. ``own`` is how many of the levels are the block's own: up to the innermost in
    which something is chosen; ``apart`` how many hold no other block. ``reason`` is why nothing of it can be rewritten,
    where that is known already; ``steered`` the path of the module whose Python depends on the values of tensors around
    it; ``mixture`` that of the module whose only choice sends rows to single products at several places; ``unread`` the
    reason where no attempt reads it, or what was read would not pay, as what is met on the way says less.
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
    apart: int = 0
    reason: str = ""
    steered: str | None = None
    mixture: str | None = None
    unread: str = ""

    def own_levels(self) -> list[str]:
        """Paths of the levels that are the block's own, innermost first."""
        return [level.path for level in self.levels[: self.own]]


def numbered_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, str, torch.Size]]:
    """For each part of a tensor's name that holds a number: the part's place, the name without the number, the shape.
    Tensors that have one in common are twins."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if re.search(r"\d", part):
            yield i, ".".join([*parts[:i], re.sub(r"\d+", "#", part), *parts[i + 1 :]]), tensor.shape


def counted_by_name(
    rows: Mapping[str, fx.Node], named: Mapping[str, torch.Tensor], twins: Mapping[Any, int], firsts: set[str]
) -> int:
    """How many experts the list has in which most of some matrices lie, those that the example does not name too, and
    others beside it; a shared one does not read rows that are picked where they do. 0: they lie in no list.

    Args:
        rows: what each matrix multiplies, by its name.
        twins: of each numbered part of a name, how many tensors have it in common.
        firsts: names of the experts' first matrices.
    """
    if any(path not in named or named[path].dim() > 2 for path in rows):
        return 0
    held = {path: {key[:2] for key in numbered_tensors(path, named[path])} for path in rows}
    lists = Counter(key for keys in held.values() for key in keys)
    home, members = max(lists.items(), key=lambda found: found[1], default=((0, ""), 0))
    ins = {key[:2] for path in firsts if path in named for key in numbered_tensors(path, named[path])}
    if home in ins:  # one list of first and last matrices
        return 0
    routed = any(picks_rows(rows[path]) for path in rows if home in held[path])
    beside = sum(picks_rows(rows[path]) or not routed for path in rows if home not in held[path])
    return twins[home] + beside if members > 1 else 0


def layers_of(module: nn.Module) -> int:
    return sum(p.dim() > 1 for p in module.parameters())


def closest(places: list[BlockCandidate]) -> list[BlockCandidate]:
    """The places without those whose experts were found closer too, in a call inside theirs."""
    readers: dict[int, list[BlockCandidate]] = {}
    for place in places:
        for weight in place.weights if place.kind == "moe" else ():
            readers.setdefault(weight, []).append(place)

    def closer(place: BlockCandidate) -> bool:
        others = {id(o): o for w in place.weights for o in readers[w] if o.call is not place.call}
        return any(place.call is level for o in others.values() for level in o.levels)

    return [p for p in places if p.kind != "moe" or not closer(p)]


def each_once(places: list[BlockCandidate]) -> list[BlockCandidate]:
    """The places without second readings of one call that share weights (three matmuls in a row are two candidates):
    the one of most experts is kept, as a product that joins experts' results may be read as one of them."""
    seen: dict[int, set[int]] = {}
    found = []
    for place in sorted(places, key=lambda p: -(p.experts or 0)):
        weights = seen.setdefault(place.call.index, set()) if place.kind == "moe" else set()
        if weights.isdisjoint(place.weights):
            found.append(place)
        weights |= place.weights
    return found


def identity_of(product: fx.Node) -> tuple[Any, ...]:
    """Which part of which Parameter a matmul multiplies by: its name and the slicing that leads to it; of a weight that
    is computed of several (a shared one times an own one) the names of all."""
    found = weight_and_operand(product, {})
    steps: list[Any] = []
    node = found[0] if found is not None else product
    if found is None and (made := _computed_weight(product)) is not None:
        return tuple(sorted({(str(n.target), _plain_args(n)) for n in ancestors([made])}))
    while node.op == "call_function" and node.all_input_nodes:
        steps.append((str(node.target), _plain_args(node)))
        if is_pointwise(node) and len(node.all_input_nodes) > 1:
            others = ancestors(node.all_input_nodes[1:])
            steps.append(tuple(sorted(str(n.target) for n in others if n.op == "get_attr")))
        node = node.all_input_nodes[0]
    return (str(node.target), *steps)


def _plain_args(node: fx.Node) -> str:
    return repr([a for a in node.args if not isinstance(a, fx.Node)])


def _computed_weight(product: fx.Node) -> fx.Node | None:
    """What a product reads that is computed of no input; None where all is, or nothing."""
    return next((a for a in product.all_input_nodes if all(n.op != "placeholder" for n in ancestors([a]))), None)


def laid_out_flat(weight: fx.Node) -> int:
    """How many matrices of one stack a matrix ``weight`` holds side by side; 1 where it is no stack laid out.

    Of a stack of cubes (E, I, O, degrees) they lie in the columns of what rows are multiplied by; one kernel has no
    such columns. The kernel of a convolution is one of three dimensions as it lies, and no stack.
    """
    whole = math.prod(weight.meta["shape"])
    kernel = weight.meta["shape"] if any(op_name(u) == "convolution" for u in weight.users) else None
    leaves = [n.meta["shape"] for n in ancestors([weight]) if n.op == "get_attr" and n.meta["shape"] != kernel]
    wide = weight.meta["shape"][-1] if any(u.args and u.args[-1] is weight for u in weight.users) else 0
    stacks = (s for s in leaves if len(s) == 3 or (len(s) == 4 and wide > s[0] and wide % s[0] == 0))
    return next((int(shape[0]) for shape in stacks if math.prod(shape) == whole), 1)


def len_of_stack(product: fx.Node) -> int:
    """How many matrices a matmul multiplies by; where ids pick one for each row, how many there are to pick from."""
    found = weight_and_operand(product, {})
    if found is None:
        return 1
    if len(found[0].meta["shape"]) != 3 or found[0].meta["shape"][0] == 1 or op_name(product) == "convolution":
        return laid_out_flat(found[0])
    picked = next((n for n in ancestors([found[0]]) if op_name(n) in ("index", "index_select")), None)
    stack = found[0] if picked is None else picked.all_input_nodes[0]
    return int(stack.meta["shape"][0])
