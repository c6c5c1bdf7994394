"""What a routing is: the triples of a probe call, and how ids and weights are read from the model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import fx

from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.obstacles import Rank
from moeopt.recognise.ffn_candidates import FFNCandidate

Search = Callable[[Tape, "list[fx.Node]", "Table", "torch.dtype | None"], "Iterator[Routing]"]


Steps = list[tuple[Any, tuple[Any, ...]]]


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
    """No tensor says which experts a token has.

    Attributes:
        routed: sets of candidates that may be routed, where others of their shapes serve every token (shared experts).
    """

    rank = Rank.READING
    routed: tuple[list[FFNCandidate], ...] = ()


class NoWeights(Declined):
    """Which experts a token has was found, and no tensor that holds their weights."""

    rank = Rank.READING


class FixedShares(Declined):
    """Each expert reads its own part of the rows, whatever the router says."""


@dataclass
class Routing:
    """How to build ids (T, K) and weights (T, K) from nodes of the tape.

    ``ids`` and ``weights`` are extractions: (source node, steps), each step a call whose first argument is
    the value so far (``"@ids"`` stands for the built ids). ``ids`` is None where the weights are a
    dense table: then ``table_to_ids`` makes them. ``experts[v]`` is the candidate that id ``v`` names.
    ``leave_out``: makes ids of ids, weights and E, where the dispatch takes no row whose weight is zero.
    ``of_groups``: whether each row of ids was repeated for the tokens of a sequence.
    """

    top_k: int
    ids: Extraction | None
    weights: Extraction
    experts: list[int]
    form: RoutingForm
    keys: tuple[Key, ...] = ()
    leave_out: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] | None = None
    of_groups: bool = False

    @property
    def nodes(self) -> list[fx.Node]:
        """Every node that it reads."""
        return [*self.weights.nodes, *([] if self.ids is None else self.ids.nodes)]

    @property
    def missing(self) -> int:
        """How many experts' code the call did not show, where that code is kept for the routing."""
        return self.weights.missing

    @property
    def per_token(self) -> int | None:
        """How many experts each token has; None where that differs from token to token."""
        varies = self.ids is None or self.form is RoutingForm.TABLE or self.form.given
        return None if varies else self.top_k


@dataclass
class Extraction:
    """``source`` put through ``steps``: [(op, rest of the arguments)]; source None means "made from ids".

    ``beside``: where each slot of a token has a vector of its own, (T,) entries each, those of the further slots; or,
    where a step takes "@beside", the one tensor that it takes.
    """

    source: fx.Node | None
    steps: Steps = field(default_factory=list)
    beside: tuple[fx.Node, ...] = ()

    missing = 0
    """Experts without which it is not whole; see :class:`~moeopt.recognise.routing_by_sum.SumOfCodes`."""

    @property
    def nodes(self) -> list[fx.Node]:
        """Every node that it reads."""
        return [] if self.source is None else [self.source, *self.beside]

    @property
    def places(self) -> list[fx.Node | None]:
        """The same; ``[None]`` where it reads none."""
        return [*self.nodes] or [None]

    @property
    def joined(self) -> bool:
        """Whether it begins with its tensors side by side."""
        return bool(self.beside) and not any("@beside" in rest for _, rest in self.steps)

    def run(self, tape: Tape, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The extraction on the probe call's own values."""
        return self.of([tape.value(node) for node in self.nodes], ids)

    def of(self, values: list[torch.Tensor], ids: torch.Tensor | None) -> torch.Tensor:
        """The extraction on a value for each of its ``nodes``."""
        first = side_by_side(values) if self.joined else values[0] if values else ids
        return self.on(first, ids, values[-1] if self.beside else None)

    def on(
        self, value: torch.Tensor | None, ids: torch.Tensor | None = None, beside: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The extraction on another value of its source."""
        named = {"@ids": ids, "@beside": beside}
        for op, rest in self.steps:
            value = op(value, *[named[a] if isinstance(a, str) else a for a in rest])
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
    ``weighed``: whether the experts' outputs may be multiplied by a float tensor that is computed from the input.
    Weights that are constant on this probe call may then differ on another call.
    ``alone``: whether what they are added onto, if anything, was computed before them: no other expert's results.
    """

    weights: torch.Tensor
    visits: torch.Tensor
    natural: list[int]
    num_named: int
    weighed: bool
    factors: tuple[float, ...] = ()
    alone: bool = True

    @cached_property
    def chosen(self) -> torch.Tensor:
        """(T, C) seen with a weight that is not zero."""
        return (self.visits > 0) & (self.weights != 0)

    @cached_property
    def reached(self) -> int:
        """How many experts some token chose."""
        return int(self.chosen.any(0).sum())


Key = tuple[int, int] | None


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


KEEP_ORDER = ("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "detach", "alias", "clone",
               "contiguous")  # fmt: skip


UNWRITTEN = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def fits_table(made: torch.Tensor, table: Table) -> bool:
    return same_values(made.to(table.weights.dtype), table.weights)
