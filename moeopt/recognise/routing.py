"""The routing: the tensors in the model that say which experts each token has, and with what weight.

The probe call yields triples (token, expert, weight). Any tensor computed before the experts whose
entries equal them is the router's answer; everything after it is dispatch and is dropped, everything
before it is the router and is kept. In order of preference:

    ids (T, K) integers           a permutation-free list of experts per token
    weights (T, K)                the weight of each id, bit for bit
    scores (T, E)                 a table that holds the weights at the chosen places (gathered by id)
    dense (T, E) or (T, E, C)     zero where an expert is not chosen (summed over capacity slots C)
    mask (T, K, E)                one-hot choices; an all-zero row is a dropped token. In a mask that is an
                                  argument any number of experts may be named: each entry gets a slot of its own
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.replay import descendants
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.obstacles import Rank

Search = Callable[[Tape, "list[fx.Node]", "Table", "torch.dtype | None"], "Iterator[Routing]"]
Steps = list[tuple[Any, tuple[Any, ...]]]
aten = torch.ops.aten


class RoutingForm(str, Enum):
    """In what form a model says which experts a token has. T tokens, E experts, K chosen per token."""

    IDS = "ids and weights"
    """(T, K) each."""
    IDS_ALONE = "ids, constant weight"
    ONE_HOT = "one-hot mask"
    """(T, K, E), with weights (T, K)."""
    ONE_HOT_ALONE = "one-hot mask, constant weight"
    GIVEN_MASK = "given mask"
    """A mask that is an argument of the module: any number of experts may be named, each entry gets a slot."""
    GIVEN_MASK_ALONE = "given mask, constant weight"
    DENSE = "dense"
    """A weight (T, E) for every expert, none of them zero."""
    TABLE = "table"
    """Weights (T, E), zero where an expert is not chosen."""
    EVERY_GROUP = "every group"
    """A dense FFN that was split: each group of neurons runs on every token, with weight 1."""

    @property
    def given(self) -> bool:
        """Whether the choice is a mask that the module is called with."""
        return self in (RoutingForm.GIVEN_MASK, RoutingForm.GIVEN_MASK_ALONE)

    @property
    def without_weights(self) -> RoutingForm:
        """The form of the same choice where every choice has one weight."""
        return RoutingForm(f"{self.value}, constant weight")


class NoIds(Declined):
    """No tensor says which experts a token has."""

    rank = Rank.READING


class FixedShares(Declined):
    """Each expert reads its own part of the rows, whatever the router says."""


@dataclass
class Routing:
    """How to build ids (T, K) and weights (T, K) from nodes of the tape.

    ``ids`` and ``weights`` are extractions: (source node, steps), each step a call whose first argument is
    the value so far (``"@ids"`` stands for the built ids). ``ids`` is None where the weights are a
    dense table: then ``table_to_ids`` makes them. ``experts[v]`` is the candidate that id ``v`` names.
    """

    top_k: int
    ids: Extraction | None
    weights: Extraction
    experts: list[int]
    form: RoutingForm
    keys: tuple[Key, ...] = ()

    @property
    def per_token(self) -> int | None:
        """How many experts each token has; None where that differs from token to token."""
        varies = self.ids is None or self.form is RoutingForm.TABLE or self.form.given
        return None if varies else self.top_k


@dataclass
class Extraction:
    """``source`` put through ``steps``: [(op, rest of the arguments)]; source None means "made from ids".

    ``beside``: where each slot of a token has a vector of its own, (T,) entries each, those of the further slots.
    """

    source: fx.Node | None
    steps: Steps = field(default_factory=list)
    beside: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> list[fx.Node]:
        """Every node that it reads."""
        return [] if self.source is None else [self.source, *self.beside]

    @property
    def places(self) -> list[fx.Node | None]:
        """The same; ``[None]`` where it reads none."""
        return [*self.nodes] or [None]

    def run(self, tape: Tape, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The extraction on the probe call's own values."""
        values = [tape.value(node) for node in self.nodes]
        return self.on(side_by_side(values) if self.beside else values[0] if values else ids, ids)

    def on(self, value: torch.Tensor | None, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The extraction on another value of its source."""
        for op, rest in self.steps:
            args = [ids if a == "@ids" else a for a in rest]
            value = op(value, *args)  # type: ignore[operator]
        assert value is not None
        return value


def side_by_side(vectors: list[torch.Tensor]) -> torch.Tensor:
    """(T, K) of K tensors of T entries each."""
    return torch.cat([vector.reshape(-1, 1) for vector in vectors], 1)


@dataclass
class Table:
    """What the probe call showed, (T, C): ``visits``, how often expert c saw token t; ``weights``, how it entered.

    ``natural``: candidates in the order of their Parameters, the numbering that is tried first.
    ``num_named``: how many experts the model names, those that share Parameters counted apart.
    ``factors``: constants that stand between the experts and their sum, by which weights may be multiplied.
    ``weighed``: a float computed from the input reaches the sum beside the experts, so weights that are
    constant on this probe call may not be constant elsewhere.
    """

    weights: torch.Tensor
    visits: torch.Tensor
    natural: list[int]
    num_named: int
    weighed: bool
    factors: tuple[float, ...] = ()

    @cached_property
    def chosen(self) -> torch.Tensor:
        """(T, C) seen with a weight that is not zero."""
        return (self.visits > 0) & (self.weights != 0)

    @cached_property
    def reached(self) -> int:
        """How many experts some token chose."""
        return int(self.chosen.any(0).sum())


def find_routing(
    tape: Tape,
    before: list[fx.Node],
    table: Table,
    dtype: torch.dtype | None,
    prior: tuple[Routing, list[int]] | None = None,
    accept: Callable[[Routing], None] = lambda routing: None,
    rarer: Sequence[Search] = (),
) -> Routing:
    """Find ids and weights among ``before``, nodes that depend on no expert.

    Args:
        dtype: of the weights where they multiply, to prefer among equal tensors.
        prior: what another probe call showed, and the candidate of each id on this one; the same tensors are
            taken where they still hold.
        accept: raises ``Declined`` for a reading that cannot be the router's answer; the next is tried.
        rarer: searches that are made where the usual ones find nothing.

    Raises:
        Declined: no tensor holds the choice or the weights.
    """
    refused: Declined | None = None
    again = _again(tape, before, table, *prior) if prior is not None else None
    searches = itertools.chain.from_iterable(
        _search(tape, before, table, dtype, factor, searches)
        for searches in (_USUAL, rarer)
        for factor in (1.0, *table.factors)
    )
    for found in itertools.chain([again] if again is not None else [], searches):
        try:
            accept(found)
        except Declined as err:
            refused = refused or err.with_traceback(None)
            continue
        extractions = [r for r in (found.ids, found.weights) if r is not None]
        found.keys = tuple(_key(before, node) for r in extractions for node in r.places)
        return found
    if refused is not None:
        try:
            raise refused
        finally:
            del refused
    if (chosen := _left_out(tape, before, table)) is not None:
        raise Declined(
            "its experts leave out tokens that the router gave them (a capacity that keeps the first so many), so that "
            "a token's result depends on the tokens before it; set the weights of such tokens to 0 in the tensor of "
            "all tokens' weights, or raise the capacity until no token is left out",
            chosen.meta.get("source", ""),
        )
    ids = next(id_recipes(tape, before, table), None)
    if ids is None:
        seen, taken = table.visits.sum(1), table.visits.sum(0)
        if bool((taken == taken[0]).all()) and bool((seen != seen[0]).any()):
            raise Declined(
                "each of its experts takes the same number of tokens while tokens get different numbers of experts: "
                "that is expert choice routing, where a token's experts depend on the other tokens; the op routes each "
                "token by itself"
            )
        order = table.visits[:, table.natural].argmax(1)
        turns = int((order.diff() < 0).sum()) + 1  # once through the experts for each sequence of the batch
        in_blocks = len(order) % turns == 0 and bool((order.view(turns, -1) == order.view(turns, -1)[0]).all())
        if in_blocks and bool((seen == 1).all()) and bool((taken == taken[0]).all()):
            raise FixedShares(
                "every expert reads its own fixed share of the rows (slots that mix tokens, as in soft MoE, or a "
                "slice of the batch), so no tensor before the experts holds the expert ids of each token: the op "
                "dispatches whole tokens by id"
            )
        raise NoIds(
            "no tensor before the experts holds the expert ids of each token (as integers, a one-hot mask or a "
            "dense table of weights); return the router's top-k as tensors that the dispatch reads"
        )
    raise Declined(
        "the expert ids were found, but no tensor holds the routing weights that the experts are multiplied by "
        "(a later expert may replace the result of an earlier one); compute the weights of all tokens in one tensor "
        "before the loop, and add up the results",
        "" if ids[0].source is None else ids[0].source.meta.get("source", ""),
        rank=Rank.READING,
    )


def _left_out(tape: Tape, before: list[fx.Node], table: Table) -> fx.Node | None:
    """The tensor of a choice that names every visit, and pairs of token and expert that were none."""
    tokens, candidates = table.visits.shape
    seen = (table.visits > 0)[:, torch.tensor(table.natural)]
    for node in before:
        source = node.args[0] if node.target is operator.getitem else node
        chosen = isinstance(source, fx.Node) and op_name(source) in ("topk", "sort", "argsort", "argmax")
        size = math.prod(node.meta.get("shape") or ())
        if not chosen or node.meta["dtype"] != torch.int64 or not size or size % tokens or size >= tokens * candidates:
            continue
        for steps in _orders(node.meta["shape"], tokens, size // tokens):
            ids = Extraction(node, steps).run(tape)
            if int(ids.max()) < candidates:
                named = torch.zeros(tokens, candidates, dtype=torch.bool).scatter_(1, ids, True)
                if bool((named | ~seen).all()) and bool((named & ~seen).any()):
                    return node
    return None


def _search(
    tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None, factor: float,
    searches: Sequence[Search],
) -> Iterator[Routing]:  # fmt: skip
    """Every reading of ``before`` by which ``factor`` times the weights found are those of ``table``."""
    if factor != 1.0:
        table = dataclasses.replace(table, weights=(table.weights.double() / factor).to(table.weights.dtype))
    for search in searches:
        for found in search(tape, before, table, dtype):
            if factor != 1.0:
                steps = [*found.weights.steps, (aten.mul.Scalar, (factor,))]
                found.weights = dataclasses.replace(found.weights, steps=steps)
            yield found


Key = tuple[int, int] | None


def _fingerprints(before: list[fx.Node]) -> dict[fx.Node, int]:
    """A hash of how each node is computed, sizes left out: equal for the same line of two probe calls."""
    prints: dict[fx.Node, int] = {}

    def word(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return prints.get(a, hash(a.op))
        if isinstance(a, (list, tuple)):
            return tuple(word(x) for x in a)
        return None if isinstance(a, int) and not isinstance(a, bool) else repr(a)

    for node in before:
        name = str(node.target) if node.op != "get_attr" or "constant" not in node.meta else "constant"
        prints[node] = hash((node.op, name, tuple(word(a) for a in node.args)))
    return prints


def _key(before: list[fx.Node], node: fx.Node | None) -> Key:
    if node is None:
        return None
    prints = _fingerprints(before)
    alike = [n for n in before if prints[n] == prints[node]]
    return prints[node], alike.index(node)


def _again(tape: Tape, before: list[fx.Node], table: Table, prior: Routing, mapping: list[int]) -> Routing | None:
    """``prior``'s extractions on the same lines of this tape, if they give what this probe call showed."""
    prints = _fingerprints(before)
    by_print: dict[int, list[fx.Node]] = {}
    for node in before:
        by_print.setdefault(prints[node], []).append(node)

    keys = iter(prior.keys)

    def here(extraction: Extraction) -> Extraction | None:
        nodes = []
        for _ in extraction.places:
            key = next(keys)
            if key is None:
                return Extraction(None, extraction.steps)
            alike = by_print.get(key[0], [])
            if key[1] >= len(alike):
                return None
            nodes.append(alike[key[1]])
        return Extraction(nodes[0], extraction.steps, tuple(nodes[1:]))

    ids_extraction = here(prior.ids) if prior.ids is not None else None
    if prior.ids is not None and ids_extraction is None:
        return None
    weights_extraction = here(prior.weights)
    if weights_extraction is None:
        return None
    try:
        ids = (
            ids_extraction.run(tape).long()
            if ids_extraction is not None
            else table_to_ids(weights_extraction.run(tape))
        )
        weights = weights_extraction.run(tape, ids)
        same_form = weights.shape == ids.shape and ids.shape[0] == table.visits.shape[0]
        fits = same_form and _fits(rebuilt(ids, weights, mapping, table.visits.shape[1]), table)
    except (RuntimeError, IndexError):  # the extraction does not apply to what stands on those lines here
        return None
    return Routing(prior.top_k, ids_extraction, weights_extraction, mapping, prior.form) if fits else None


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal within the rounding of the coarser dtype."""
    if a.shape != b.shape:
        return False
    if a.dtype != b.dtype:
        coarse = min(a.dtype, b.dtype, key=lambda d: torch.finfo(d).bits if d.is_floating_point else 64)
        if not coarse.is_floating_point:
            coarse = b.dtype
        a, b = a.to(coarse), b.to(coarse)
    if torch.equal(a, b):
        return True
    slack = 4 * torch.finfo(b.dtype).eps if b.dtype.is_floating_point else 0
    return bool(((a.double() - b.double()).abs() <= slack * b.double().abs()).all())


def id_recipes(tape: Tape, before: list[fx.Node], table: Table) -> Iterator[tuple[Extraction, torch.Tensor, list[int]]]:
    """(extraction, ids (T, K), candidate of each id) for every integer tensor that names the chosen experts."""
    tokens, candidates = table.visits.shape
    possible = list(_possible_sources(before, floating=False))
    reread = _reread(possible)
    counted = _as_many_as_chosen(tape)
    for node in sorted(reversed(possible), key=lambda n: n in counted):
        numel = math.prod(node.meta["shape"])
        if node in reread or not tokens or numel % tokens or not numel:
            continue
        k = numel // tokens
        if k > max(candidates, 64):
            continue
        low, high = (int(v) for v in torch.aminmax(tape.value(node)))
        # too few values to name every expert, or noise
        if low < 0 or not table.reached - 1 <= high < 4 * candidates + 64:
            continue
        for steps in _orders(node.meta["shape"], tokens, k):
            extraction = Extraction(node, steps)
            ids = extraction.run(tape).long()
            mapping = _mapping(ids, table)
            if mapping is not None:
                extraction = _rooted_ids(tape, extraction, ids)
                if extraction.source is not None and extraction.source.meta["dtype"] != torch.int64:
                    extraction.steps.append((aten.to.dtype, (torch.int64,)))
                yield extraction, ids, mapping


def _as_many_as_chosen(tape: Tape) -> set[fx.Node]:
    """Tensors whose size is data (the places that are not zero): K entries a token on this probe call alone."""
    starts = [n for n in tape.nodes if op_name(n) in ("nonzero", "masked_select")]
    return {*starts, *descendants(tape, starts)} if starts else set()


def _orders(shape: tuple[int, ...], tokens: int, k: int) -> list[Steps]:
    """Ways to read T*K entries as (T, K): token-major, then slot-major."""
    straight: Steps = [(aten.reshape.default, ([-1, k],))]
    if tuple(shape) == (tokens, k):
        straight = []
    slots_first: Steps = [
        (aten.reshape.default, ([k, -1],)),
        (aten.t.default, ()),
    ]
    return [straight] if k == 1 else [straight, slots_first]


def _possible_sources(before: list[fx.Node], *, floating: bool) -> Iterator[fx.Node]:
    for node in before:
        dtype = node.meta.get("dtype")
        if dtype is None or not node.meta["shape"] or node.op == "get_attr" or op_name(node) in _UNWRITTEN:
            continue
        if (dtype.is_floating_point if floating else dtype in _INTEGERS) and not dtype.is_complex:
            yield node


def _reread(possible: list[fx.Node]) -> set[fx.Node]:
    """Candidates whose entries another one before them holds in the same order: read as (T, K) they say the same."""
    shown = set(possible)
    return {
        n
        for n in possible
        if op_name(n) in _KEEP_ORDER
        and (source := n.args[0]) in shown
        and source.meta["dtype"] == n.meta["dtype"]  # type: ignore[union-attr]
        and math.prod(source.meta["shape"]) == math.prod(n.meta["shape"])  # type: ignore[union-attr]
    }


_KEEP_ORDER = ("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "detach", "alias", "clone",
               "contiguous")  # fmt: skip
_UNWRITTEN = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def _mapping(ids: torch.Tensor, table: Table) -> list[int] | None:
    """candidate of each id value, such that every visit is named by an id, and every id in range is a visit."""
    experts = table.visits.shape[1]
    seen = table.visits > 0
    values = torch.unique(ids)
    if values.numel() < table.reached:
        return None
    named = torch.zeros(ids.shape[0], max(int(values.max()) + 1, experts), dtype=torch.bool)
    named.scatter_(1, ids, True)
    natural = torch.tensor(table.natural)
    if torch.equal(named[:, :experts], seen[:, natural]) or _covers(
        named[:, :experts], seen[:, natural], table, natural
    ):
        return table.natural
    return _learnt(named, seen, table)


def _learnt(named: torch.Tensor, seen: torch.Tensor, table: Table) -> list[int] | None:
    """The candidate whose tokens include those of each id; every id must have one, every visit an id."""
    both = named.t().float() @ seen.float()
    size = named.sum(0).float()[:, None]
    fits = (both == size) & (size > 0)
    exact = fits & (both == seen.sum(0).float())
    choice = torch.where(exact.sum(1, keepdim=True) == 1, exact, fits)
    if not bool((choice.sum(1) == 1).all()):
        return None
    mapping: list[int] = choice.to(torch.uint8).argmax(1).tolist()
    if len(mapping) != max(table.num_named, seen.shape[1]) or set(mapping) != set(range(seen.shape[1])):
        return None
    union = torch.zeros_like(seen)
    for v, c in enumerate(mapping):
        union[:, c] |= named[:, v]
    return mapping if torch.equal(union, seen) else None


def _covers(named: torch.Tensor, seen: torch.Tensor, table: Table, natural: torch.Tensor) -> bool:
    """Dense forms let every expert see every token: there the chosen ones (weight not 0) must be named.

    Capacity drops: a named expert may not have seen the token; then nothing else may have.
    """
    chosen = table.chosen[:, natural]
    if bool(seen.all()):
        return torch.equal(named & chosen, chosen) and int(named.sum(1).max()) < seen.shape[1]
    extra = named & ~seen
    return bool((~(seen & ~named)).all()) and bool(seen.any()) and int(extra.sum()) * 2 < int(named.sum())


def rebuilt(ids: torch.Tensor, weights: torch.Tensor, mapping: list[int], candidates: int) -> torch.Tensor:
    """The (T, C) table that ids and weights stand for; ids beyond the experts name nothing."""
    out = torch.zeros(ids.shape[0], candidates, dtype=torch.float64)
    candidate = torch.tensor([*mapping, -1])[ids.clamp(max=len(mapping))]
    for k in range(ids.shape[1]):
        keep = candidate[:, k] >= 0
        rows = torch.arange(ids.shape[0])[keep]
        out.index_put_((rows, candidate[keep, k]), weights[keep, k].double(), True)
    return out


def _by_ids(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None) -> Iterator[Routing]:
    tokens, candidates = table.visits.shape
    possible = list(_possible_sources(before, floating=True))
    reread = _reread(possible)
    for extraction, ids, mapping in id_recipes(tape, before, table):
        k = ids.shape[1]
        best: list[tuple[tuple[bool, bool, bool, int], Extraction]] = []
        for node in possible:
            numel = math.prod(node.meta["shape"])
            preferred = dtype is None or node.meta["dtype"] == dtype
            if numel == tokens * k and node not in reread:
                for steps in _orders(node.meta["shape"], tokens, k):
                    weights = Extraction(node, steps)
                    made = rebuilt(ids, weights.run(tape), mapping, candidates)
                    if _fits(made, table):
                        best.append(((preferred, True, _exact(made, table), node.meta["index"]), weights))
                        break
            if numel == tokens * candidates and int(ids.max()) < candidates:
                for steps, _ in _tables(node.meta["shape"], tokens, candidates):
                    weights = Extraction(node, [*steps, (aten.gather.default, (1, "@ids"))])
                    made = rebuilt(ids, weights.run(tape, ids), mapping, candidates)
                    if _fits(made, table):
                        best.append(((preferred, False, _exact(made, table), node.meta["index"]), weights))
                        break
            elif numel == tokens and k > 1:
                weights = Extraction(node, [(aten.reshape.default, ([-1, 1],)), (aten.expand.default, ([-1, k],))])
                made = rebuilt(ids, weights.run(tape), mapping, candidates)
                if _fits(made, table):
                    best.append(((preferred, False, _exact(made, table), node.meta["index"]), weights))
        constant = _constant(ids, mapping, table)
        best.sort(key=lambda b: b[0], reverse=True)
        for _, weights in best if constant is not None else best[:1]:  # equal constants are many: each is asked
            yield Routing(k, extraction, _rooted(tape, weights, ids, mapping, table), mapping, RoutingForm.IDS)
        if constant is not None and not table.weighed:
            yield Routing(k, extraction, _constant_weights(constant, table), mapping, RoutingForm.IDS_ALONE)


def _rooted_ids(tape: Tape, extraction: Extraction, ids: torch.Tensor) -> Extraction:
    """The same ids where they are first written down; see :func:`_rooted`."""
    node = extraction.source
    while node is not None and moves_rows(node) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        shape = node.meta.get("shape")
        if shape is None:
            continue
        if math.prod(shape) != ids.numel() or node.op == "get_attr" or node.meta["dtype"] not in _INTEGERS:
            break
        for steps in _orders(shape, *ids.shape):
            attempt = Extraction(node, steps)
            if torch.equal(attempt.run(tape).long(), ids):
                extraction = attempt
                break
    return extraction


def _rooted(tape: Tape, extraction: Extraction, ids: torch.Tensor, mapping: list[int], table: Table) -> Extraction:
    """The same weights where they are first written down: copies and reshapes of them are dispatch.

    Only pure movement is undone: an earlier tensor that merely is equal on this probe call may not be on
    another.
    """
    node, best = extraction.source, extraction

    def exact(weights: Extraction) -> bool:
        return _exact(rebuilt(ids, weights.run(tape), mapping, table.visits.shape[1]), table)

    if any(op in (aten.gather.default, aten.expand.default) for op, _ in extraction.steps):
        return extraction
    while node is not None and moves_rows(node) and len(node.all_input_nodes) == 1:
        parent = node.all_input_nodes[0]
        same = parent.meta.get("dtype") == node.meta.get("dtype") and parent.op != "get_attr"
        if not same or math.prod(parent.meta.get("shape") or (0,)) != math.prod(node.meta["shape"]):
            break
        node = parent
        tokens = table.visits.shape[0]
        for steps in _orders(node.meta["shape"], tokens, math.prod(node.meta["shape"]) // max(tokens, 1)):
            attempt = Extraction(node, steps)
            if exact(attempt) or not exact(best):
                best = attempt
                break
    return best


def _exact(made: torch.Tensor, table: Table) -> bool:
    return torch.equal(made.to(table.weights.dtype), table.weights)


def _constant_weights(value: float, table: Table) -> Extraction:
    return Extraction(None, [(aten.to.dtype, (table.weights.dtype,)), (aten.full_like.default, (value,))])


def _fits(made: torch.Tensor, table: Table) -> bool:
    return same_values(made.to(table.weights.dtype), table.weights)


def _constant(ids: torch.Tensor, mapping: list[int], table: Table) -> float | None:
    """The one weight that every visit has (hard routing, or weights applied later), or None."""
    values = table.weights[table.chosen if bool((table.visits > 0).all()) else table.visits > 0]
    if not values.numel() or not bool((values == values[0]).all()):
        return None
    value = float(values[0])
    full = torch.full(ids.shape, value, dtype=torch.float64)
    return value if _fits(rebuilt(ids, full, mapping, table.visits.shape[1]), table) else None


def _tables(shape: tuple[int, ...], tokens: int, experts: int) -> Iterator[tuple[Steps, int]]:
    """Ways to read T*E entries as (T, E): each axis of size E may be the expert axis, the last first."""
    for axis in sorted((d for d, s in enumerate(shape) if s == experts), reverse=True):
        steps: Steps = []
        if axis != len(shape) - 1:
            steps.append((aten.movedim.int, (axis, -1)))
        if len(shape) != 2:
            steps.append((aten.reshape.default, ([-1, experts],)))
        yield steps, axis
    if experts not in shape or len(shape) == 1:
        yield [(aten.reshape.default, ([-1, experts],))], -1


def _by_dense(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None = None) -> Iterator[Routing]:
    """A (T, E) table, or (T, E, C) summed over C, that is the weights themselves."""
    tokens, candidates = table.visits.shape
    natural = torch.tensor(table.natural)
    want = table.weights[:, natural]
    for node in sorted(_possible_sources(before, floating=True), key=lambda n: -n.meta["index"]):
        shape = node.meta["shape"]
        numel = math.prod(shape)
        if numel == tokens * candidates:
            for steps, _ in _tables(shape, tokens, candidates):
                value = Extraction(node, steps).run(tape)
                if same_values(value, want) or (_asked_positive(node) and same_values(value.clamp(min=0), want)):
                    yield _dense(node, steps, table)
        elif candidates in shape and numel % (tokens * candidates) == 0 and numel and len(shape) >= 3:
            for axis in (d for d, s in enumerate(shape) if s == candidates):
                for slots in _slot_axes(len(shape), axis):
                    steps = [(aten.sum.dim_IntList, (slots,)), *_after_sum(shape, axis, slots, candidates)]
                    if same_values(Extraction(node, steps).run(tape), want):
                        yield _dense(node, steps, table)


def _slot_axes(rank: int, axis: int) -> list[list[int]]:
    """The axes that capacity slots may lie on: any one that is not the expert axis, the last first."""
    return [[d] for d in reversed(range(rank)) if d != axis]


def _after_sum(shape: tuple[int, ...], axis: int, slots: list[int], candidates: int) -> Steps:
    left = [d for d in range(len(shape)) if d not in slots]
    at = left.index(axis)
    steps: Steps = []
    if at != len(left) - 1:
        steps.append((aten.movedim.int, (at, -1)))
    if len(left) != 2:
        steps.append((aten.reshape.default, ([-1, candidates],)))
    return steps


def _dense(node: fx.Node, steps: Steps, table: Table) -> Routing:
    """Every expert of a token whose weight is not zero; the others are named E, which adds nothing."""
    candidates = table.visits.shape[1]
    if _asked_positive(node):
        ids = Extraction(node, [*steps, (positive_to_ids, ())])
        return Routing(candidates, ids, Extraction(node, steps), table.natural, RoutingForm.TABLE)
    full = bool(table.chosen.all())
    return Routing(
        candidates, None, Extraction(node, steps), table.natural, RoutingForm.DENSE if full else RoutingForm.TABLE
    )


def _by_mask(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None = None) -> Iterator[Routing]:
    """One-hot choices (T, K, E) with weights (T, K); an all-zero row names the id E, which adds nothing."""
    tokens, candidates = table.visits.shape
    for node in before:
        dtype, shape = node.meta.get("dtype"), node.meta.get("shape")
        if dtype is None or node.op == "get_attr" or not shape or candidates not in shape:
            continue
        if dtype.is_floating_point and dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue
        numel = math.prod(shape)
        if not tokens or numel % (tokens * candidates) or not numel or numel // (tokens * candidates) > candidates:
            continue
        value = tape.value(node)
        if not bool(((value == 0) | (value == 1)).all()):
            continue
        k = numel // (tokens * candidates)
        for axis in (d for d, s in enumerate(shape) if s == candidates):
            steps: Steps = []
            if axis != len(shape) - 1:
                steps.append((aten.movedim.int, (axis, -1)))
            steps.append((aten.reshape.default, ([-1, k, candidates],)))
            onehot = Extraction(node, steps).run(tape)
            given = _is_argument(node)
            if not given and bool((onehot.sum(-1) > 1).any()):
                continue
            read = mask_to_slots if given else mask_to_ids
            form = RoutingForm.GIVEN_MASK if given else RoutingForm.ONE_HOT
            spread: Steps = [(for_each_slot, (candidates,))] if given else []
            ids_steps: Steps = [*steps, (read, ())]
            ids = read(onehot)
            named = torch.zeros(tokens, candidates + 1, dtype=torch.bool).scatter_(1, ids, True)[:, :candidates]
            if not torch.equal(named, (table.visits > 0)[:, torch.tensor(table.natural)]):
                continue
            extraction = Extraction(node, ids_steps)
            for w in sorted(_possible_sources(before, floating=True), key=lambda n: -n.meta["index"]):
                orders = _orders(w.meta["shape"], tokens, k) if math.prod(w.meta["shape"]) == tokens * k else ()
                for order in orders:
                    weights = Extraction(w, [*order, *spread])
                    if _fits(rebuilt(ids, weights.run(tape), table.natural, candidates), table):
                        yield Routing(ids.shape[1], extraction, weights, table.natural, form)
                if given and k > 1 and math.prod(w.meta["shape"]) == tokens * candidates:
                    for score, _ in _tables(w.meta["shape"], tokens, candidates):
                        weights = Extraction(w, [*score, (aten.repeat.default, ([1, k],))])
                        if _fits(rebuilt(ids, weights.run(tape), table.natural, candidates), table):
                            yield Routing(ids.shape[1], extraction, weights, table.natural, form)
            constant = _constant(ids, table.natural, table)
            if constant is not None and not table.weighed:
                weights = _constant_weights(constant, table)
                yield Routing(ids.shape[1], extraction, weights, table.natural, form.without_weights)


def _is_argument(node: fx.Node) -> bool:
    """True for an argument of the block, seen through casts and movement."""
    while (
        node.op == "call_function" and len(node.all_input_nodes) == 1 and (moves_rows(node) or op_name(node) in _CASTS)
    ):
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


_CASTS = ("_to_copy", "to", "type_as")


def _by_choice(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None = None) -> Iterator[Routing]:
    """A (T, E) table of zeros and ones that says who is chosen, and one that holds their weights."""
    tokens, candidates = table.visits.shape
    natural = torch.tensor(table.natural)
    chosen = table.visits[:, natural]
    want = table.weights[:, natural].double()
    if bool((chosen > 1).any()):
        return
    ids: Extraction | None = None
    weights: Extraction | None = None
    for node in before:
        kind, shape = node.meta.get("dtype"), node.meta.get("shape")
        if kind is None or node.op == "get_attr" or not shape or math.prod(shape) != tokens * candidates:
            continue
        for steps, _ in _tables(shape, tokens, candidates):
            value = Extraction(node, steps).run(tape)
            if value.shape != chosen.shape:
                continue
            if torch.equal(value.double(), chosen.double()):
                ids = ids or Extraction(node, [*steps, (table_to_ids, ())])
            elif kind.is_floating_point and same_values(torch.where(chosen > 0, value.double(), 0.0), want):
                weights = weights or Extraction(node, steps)
    if ids and weights:
        yield Routing(candidates, ids, weights, table.natural, RoutingForm.TABLE)


_USUAL: tuple[Search, ...] = (_by_ids, _by_mask, _by_dense, _by_choice)


def mask_to_ids(onehot_TKE: torch.Tensor) -> torch.Tensor:
    """(T, K) index of the one in each row; E where a row has none."""
    hit = onehot_TKE != 0
    return torch.where(hit.any(-1), hit.to(torch.uint8).argmax(-1), hit.shape[-1])


def mask_to_slots(mask_TKE: torch.Tensor) -> torch.Tensor:
    """(T, K * E) the expert of each entry that is set, E where it is not: right for any number of them."""
    experts = mask_TKE.shape[-1]
    return torch.where(mask_TKE != 0, torch.arange(experts, device=mask_TKE.device), experts).flatten(1)


def for_each_slot(weights_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """(T, K * E) the weight of each entry that :func:`mask_to_slots` made."""
    return weights_TK.unsqueeze(-1).expand(-1, -1, experts).flatten(1)


def one_beyond(weights_TK: torch.Tensor, ids_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """The weights, with one for an id that names no expert: a dropped token passes through as it is."""
    return torch.where(ids_TK >= experts, 1.0, weights_TK)


def _asked_positive(node: fx.Node, depth: int = 6) -> bool:
    """True where the dispatch asks a table, or parts of it, ``> 0``: unlike ``!= 0``, that is false for a NaN."""
    for user in node.users:
        if op_name(user) == "gt" and user.args[0] is node and user.args[1] == 0:
            return True
        if depth and user.op == "call_function" and moves_rows(user) and _asked_positive(user, depth - 1):
            return True
    return False


def positive_to_ids(table_TE: torch.Tensor) -> torch.Tensor:
    """(T, E) expert e in column e where its weight is above zero, E (which adds nothing) elsewhere."""
    experts = table_TE.shape[-1]
    return torch.where(table_TE > 0, torch.arange(experts, device=table_TE.device), experts)


def table_to_ids(table_TE: torch.Tensor) -> torch.Tensor:
    """(T, E) expert e in column e where its weight is not zero, E (which adds nothing) elsewhere."""
    experts = table_TE.shape[-1]
    return torch.where(table_TE != 0, torch.arange(experts, device=table_TE.device), experts)
