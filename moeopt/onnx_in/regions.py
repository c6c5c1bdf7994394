"""The regions of a graph that may be a block of experts, each with a name, the chains in it and where it may end."""

from __future__ import annotations

import bisect
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moeopt.onnx_in.chains import ExpertChains, expert_chains
from moeopt.onnx_in.cuts import GraphRegion, common_entry, exits, is_tensor, region_between, steps_for
from moeopt.onnx_in.index import MEASURES, GraphIndex
from moeopt.onnx_in.operators.table import operator_of
from moeopt.onnx_in.products import PRODUCTS, WeightProduct, weight_products
from moeopt.onnx_in.products_of_all import of_two_blocks
from moeopt.onnx_in.program import TAKEN
from moeopt.onnx_in.single_chains import single_chains
from moeopt.onnx_in.weighed_results import blocks_of_one_table
from moeopt.value_types import OnnxNode, OnnxValue

_MOST_REGIONS = 8
"""Of one candidate: the nearest exits behind its router, the later half of them only before the next product."""
_MOST_TRIED = 64
"""Chains of which each is left out in turn."""
_FEWER = 256
"""Nodes by which a region may grow for one entry instead of several."""


@dataclass
class CandidateRegion:
    """Chains that may be experts.

    Attributes:
        name: like ``model.layers.0.mlp``, from the names of its weights or nodes.
        chains: its expert functions.
        regions: the same region up to each of its possible exits, the nearest first.
        unrouted: whether there are such exits, and nothing before them chooses or weighs among the experts.
    """

    name: str
    index: GraphIndex
    chains: ExpertChains
    regions: tuple[GraphRegion, ...]
    unrouted: bool = False


def candidate_regions(index: GraphIndex) -> Iterator[CandidateRegion]:
    """Every region of a graph whose chains are two functions or more, in the order of the graph."""
    products = weight_products(index)
    taken: set[int] = set()
    names = _Paths()
    places = sorted(products)
    count = 0
    for chains in _separate_chains(index, products):
        if chains.experts < 2 or any(p.at in taken for p in chains.products):
            continue
        positions = [p.at for p in chains.products]
        found: list[GraphRegion] = []
        unrouted = False
        behind = bisect.bisect_right(places, max(positions))
        following = places[behind] if behind < len(places) else len(index.nodes)
        for end in exits(index, positions, steps_for(positions)):
            if len(found) >= _MOST_REGIONS // 2 and index.at(end) > following:
                break
            region = _rooted(index, chains, end, taken)
            if found and region is not None and not all(map(is_tensor, region.entries)):
                continue
            unrouted |= region is not None and not _has_router(region, chains)
            if region is not None and _has_router(region, chains):
                found.append(_as_read(region, chains))
            if len(found) == _MOST_REGIONS:
                break
        taken |= set(positions)
        if unrouted and not found and chains.may_be_one_network:
            continue
        name = names.unique(region_name(chains.products) or f"region_{count}")
        count += 1
        yield CandidateRegion(name, index, chains, tuple(found), unrouted and not found)


def _as_read(region: GraphRegion, chains: ExpertChains) -> GraphRegion:
    """A region, with what is done to its steps before a reader of modules sees them."""
    apart = tuple((p.node.outputs[0].name, p.of_all) for p in chains.products if p.of_all)
    shares = chains.share_weights
    folds = chains.in_several_shapes or bool(apart) or shares
    return replace(region, folds=folds, apart=apart, shares=shares)


def _separate_chains(index: GraphIndex, products: dict[int, WeightProduct]) -> Iterator[ExpertChains]:
    """All chains; of those that join only behind others, the ones that join before."""
    every = _all_chains(index, products)
    homes = {p.at: chains for chains in every if chains.experts > 1 for p in chains.products}
    for chains in every:
        if chains.experts > 1 and _holds_another(index, chains, homes):
            chains = _that_join_before(index, chains, homes) or chains
        yield from blocks_of_one_table(index, chains) if len(chains.pairs) > 2 else [chains]


def _holds_another(index: GraphIndex, chains: ExpertChains, homes: Mapping[int, ExpertChains]) -> bool:
    """Whether the results of chains join only behind products of other chains."""
    positions = [p.at for p in chains.products]
    nearest = next(iter(exits(index, positions, steps_for(positions))), None)
    if nearest is None:
        return False
    inside = {index.position[id(node)] for node in region_between(index, chains.root, exit_=nearest).nodes}
    return any(at in homes and homes[at].pairs[0] not in chains.pairs for at in inside.difference(positions))


def _that_join_before(
    index: GraphIndex, chains: ExpertChains, homes: Mapping[int, ExpertChains]
) -> ExpertChains | None:
    """The chains without the one that joins the others only behind other chains: a shared expert, whose result is added
    at the end, of the shape of the routed ones; None where it is not one alone."""
    if not 2 < len(chains.pairs) <= _MOST_TRIED:
        return None
    several = (replace(chains, pairs=[p for p in chains.pairs if p is not one]) for one in reversed(chains.pairs))
    return next((fewer for fewer in several if not _holds_another(index, fewer, homes)), None)


def _all_chains(index: GraphIndex, products: dict[int, WeightProduct]) -> list[ExpertChains]:
    """Chains of two products, and those of one that are in none of these, in the order of their first products."""
    found = [chains for chains in expert_chains(index, products) if not of_two_blocks(index, chains)]
    held = {id(p.weight) for chains in found if chains.experts > 1 for p in chains.products}
    within = {at for at, p in products.items() if id(p.weight) in held}  # of joined results, one alone is in a chain
    return sorted([*found, *single_chains(index, within)], key=lambda chains: min(p.at for p in chains.products))


def counted_by_data(candidate: CandidateRegion) -> OnnxNode | None:
    """The choice of a candidate whose number a caller gives, or data decide; None where it is a constant or a size."""
    index = candidate.index
    choices = (node for region in candidate.regions[:1] for node in region.nodes if node.op_type == "TopK")
    asked = ((node, node.inputs[1]) for node in choices if len(node.inputs) > 1)
    return next((n for n, k in asked if not (index.is_constant(k) or index.is_size(k) or index.is_fill(k))), None)


def read_apart(candidate: CandidateRegion) -> str:
    """Why a candidate has no region, where the result of one of its experts is read beside the sum; "" elsewhere."""
    index = candidate.index
    lasts = {last.at: last for _, last in candidate.chains.pairs}
    ends = [found[-1] for at, last in lasts.items() if (found := exits(index, [at], steps_for([last])))]
    shared = Counter(map(id, ends))
    for result in ends:  # the furthest value that all of an expert's result goes through
        readers = [index.nodes[at] for at in dict.fromkeys(index.readers(result))]
        names = [f"the node {node.name!r} ({node.op_type})" for node in readers if node.op_type not in MEASURES]
        if id(result) in index.ends:
            names.append("the graph as an output")
        if len(names) > 1 and shared[id(result)] == 1:
            made = result.producer()
            return (
                f"the result of one of its experts (the node {made.name!r}, {made.op_type}) is read by "
                f"{names[0]} and by {names[1]}, and the op gives the sum of the experts alone: export the model "
                "without what reads an expert's own result, or optimise the PyTorch model"
            )
    return ""


def _rooted(index: GraphIndex, chains: ExpertChains, end: OnnxValue, taken: Collection[int]) -> GraphRegion | None:
    """The region up to ``end``, from as few entries as there can be; sizes are read off the others.

    ``taken``: where the products of blocks before it are. Where it need not, it does not grow over them: two blocks may
    share a router.
    """
    region = region_between(index, chains.root, exit_=end)
    inner = [v for v in region.entries if index.at(v) >= 0 and not index.is_size(v)]
    found: list[tuple[bool, int, GraphRegion]] = []
    if len(inner) > 1:
        shared = common_entry(index, inner, _FEWER)
        if shared is not None:
            beside = (chains.root, shared)  # masks of each expert may be made of one value beside the rows
            for roots in (beside,) if _is_whole(shared) else ((shared,), beside):
                wider = region_between(index, *roots, exit_=end)
                fewer = len(wider.entries) < len(region.entries) and len(wider.nodes) <= len(region.nodes) + _FEWER
                grown = {index.position[id(n)] for n in wider.nodes} if fewer else set()
                if {p.at for p in chains.products} <= grown:
                    found.append((not grown.isdisjoint(taken), len(found), _rows_first(wider, chains)))
                    if grown.isdisjoint(taken):
                        break
    return min(found)[2] if found else region


def _is_whole(value: OnnxValue) -> bool:
    """Whether a value is known to be whole numbers: ids, which a table turns into rows."""
    return value.dtype is not None and not value.dtype.is_floating_point()


def _rows_first(region: GraphRegion, chains: ExpertChains) -> GraphRegion:
    """The region with the experts' rows as its first entry, where they are one: a condition beside them may be found
    before them."""
    rest = [v for v in region.entries if v is not chains.root]
    return region if len(rest) == len(region.entries) else replace(region, entries=(chains.root, *rest))


def _has_router(region: GraphRegion, chains: ExpertChains) -> bool:
    """Whether anything but the experts' own products chooses or weighs among them, or an entry does."""
    if len(region.entries) > 1:
        return True
    own = {id(p.node) for p in chains.products}
    return any(
        node.op_type in ("TopK", "Softmax", "ArgMax", "Sigmoid")
        and not _feeds_a_product(node, own)
        or (operator_of(node) in PRODUCTS and id(node) not in own)
        for node in region.nodes
    )


def _feeds_a_product(node: OnnxNode, own: set[int]) -> bool:
    """Whether a node is an activation: what it gives is multiplied with its own input."""
    del own
    source = node.inputs[0]
    return any(source in user.inputs and user.op_type == "Mul" for v in node.outputs for user, _ in v.uses())


def region_name(products: Sequence[WeightProduct]) -> str:
    """The longest path that the names of the weights, or of the nodes, have in common; "" where they have none."""
    for names in (
        [p.weight.name or "" for p in products],
        [str(p.node.metadata_props.get("pkg.torch.onnx.name_scopes", "")) for p in products],
        [(p.node.name or "").strip("/").replace("/", ".") for p in products],
    ):
        paths = [_scope(name).split(".") for name in names]
        common = os.path.commonprefix([path[:-1] for path in paths])
        while len(common) > 1 and (common[-1] in ("experts", "") or common[-1].isdigit() and len(products) == 1):
            common = common[:-1]
        if common and not re.match(r"(onnx|val|_)", common[0]):
            return re.sub(r"[^\w.]", "_", ".".join(common))
    return ""


def _scope(name: str) -> str:
    """The innermost of torch's name scopes, or the name itself."""
    inner = re.findall(r"'([^']*)'", name)
    return inner[-2] + "." if len(inner) > 1 else name


class _Paths:
    """Paths of submodules: none twice, and none within another; a new one takes constant time."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._holders: set[str] = set()
        self._next: dict[tuple[str, bool], int] = {}

    def unique(self, name: str) -> str:
        """``name``, with a number behind the part of it that is taken; taken from now on."""
        parts = [f"{part}_" if not part or part in TAKEN else part for part in name.split(".")]
        made = ""
        for depth, part in enumerate(parts, 1):
            self._holders.add(made)
            made = self._free(f"{made}.{part}" if made else part, depth == len(parts))
        self._taken.add(made)
        return made

    def _free(self, path: str, last: bool) -> str:
        number = self._next.get((path, last), 1)
        made = path if number == 1 else f"{path}_{number}"
        while made in self._taken or (last and made in self._holders):
            number += 1
            made = f"{path}_{number}"
        self._next[path, last] = number  # those before it stay taken
        return made
