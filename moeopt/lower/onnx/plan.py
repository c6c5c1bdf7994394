"""Which lowering each kind of block gets, and a way to run a block through it while it is verified.

A block is checked as its engine will compute it: while :meth:`BlockPlan.run_through_backend` is open, each ``experts``
call of a rewritten block runs a session of that op alone, so the certificate speaks of the runtime's numbers.
A lowering that fails is demoted for its kind of block and the next one is tried. A backend says how lowerings
are ranked and how a session of one is opened.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec, RouterSpec
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.pad_experts import bank_of
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.override import override_experts_impl
from moeopt.ops.reference import dtypes

NodeKind = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class LoweringChoice:
    """A lowering with the time of a call in seconds, summed over the token counts; or why it cannot be taken.

    ``reason`` says where the time comes from ("estimated", "measured"), or what stands in the way.
    """

    name: str
    lowering: Lowering | None
    reason: str
    seconds: float = float("inf")


class Runnable(Protocol):
    """A loaded graph of one op."""

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Its outputs for the inputs ``x``, ``ids`` and ``weights``."""
        ...


class BlockPlan(abc.ABC):
    """The lowerings of one engine.

    Args:
        provider: what the engine runs on.
        tokens: the token counts that it will see, for the cost model; None means a decode and a prefill.

    Attributes:
        runtime: the runtime's name, for reasons.
        portable: whether the graph holds ONNX's own operators only.
        mapped: whether quantised weights are read as they lie in the file, in quicker forms or not.
        rounds: whether products of codes are to round their activations to int8.
        remarks: sentences for the certificate.
    """

    runtime = "ONNX Runtime"
    portable = mapped = rounds = False

    def __init__(self, provider: str, tokens: tuple[int, ...] | None = None) -> None:
        self.provider, self.tokens = provider, tokens
        self._ranked: dict[NodeKind, list[LoweringChoice]] = {}
        self.remarks: list[str] = []
        self._demoted: dict[NodeKind, dict[str, str]] = {}
        self._last: tuple[NodeKind, str] | None = None
        self._routers: Mapping[int, RouterSpec] = {}
        self._sessions: dict[Any, tuple[Runnable, ExpertsNode, ExpertWeights]] = {}

    @abc.abstractmethod
    def rank(self, site: ExpertsNode) -> list[LoweringChoice]:
        """Every lowering for a legal ``site``: those that fit first, the best ahead."""

    @abc.abstractmethod
    def open_session(self, site: ExpertsNode, lowering: Lowering) -> Runnable:
        """A session of one op, for blocks that are being verified."""

    def legalize(self, site: ExpertsNode) -> ExpertsNode:
        """``site`` in the dtypes that the provider computes in."""
        return site

    def check(self, site: ExpertsNode) -> None:
        """``Declined`` where the engine that this plan is for cannot carry ``site``; most plans run what they rank."""
        del site

    def choice(self, site: ExpertsNode) -> LoweringChoice:
        """The best lowering for ``site`` that was not demoted; ``Declined`` when there is none."""
        return self.best(site)

    def written(self, site: ExpertsNode) -> LoweringChoice:
        """What the graph holds that needs its runtime and nothing else: the best lowering, in most plans."""
        return self.choice(site)

    def best(self, site: ExpertsNode, without: str = "") -> LoweringChoice:
        """:meth:`choice` among the lowerings that are not called ``without``."""
        wide = self.legalize(site)
        known = kind(wide)
        demoted = self._demoted.get(known, {})
        if known not in self._ranked:
            self._ranked[known] = self.rank(wide)
        choices = self._ranked[known]
        for choice in choices:
            if choice.lowering is not None and choice.lowering.name not in (*demoted, without):
                return choice
        why = "; ".join(f"{c.name}: {'differs from the original' if c.name in demoted else c.reason}" for c in choices)
        raise Declined(f"no {self.runtime} form carries its experts on {self.provider} ({why})")

    def lowering(self, site: ExpertsNode) -> Lowering:
        """The lowering of :meth:`choice`."""
        lowering = self.choice(site).lowering
        assert lowering is not None
        return lowering

    def why(self, site: ExpertsNode) -> str:
        """The choice for ``site`` and the runner-up, in a line for reports and manifests."""
        best = self.choice(site)
        rest = [c for c in self._ranked[kind(self.legalize(site))] if c.lowering is not None and c.name != best.name]
        return f"{best.name}, {best.reason}" + (f"; next {rest[0].name}, {rest[0].reason}" if rest else "")

    @contextlib.contextmanager
    def run_through_backend(self, routers: Mapping[int, RouterSpec] | None = None) -> Iterator[None]:
        """Rewritten blocks run through their lowering inside; the sessions are let go at the end."""
        self._routers = routers or {}
        try:
            with override_experts_impl(self._run_experts):
                yield
        finally:
            self._sessions.clear()

    def demote(self, reason: str) -> bool:
        """Give up the lowering that ran last, for its kind of block; False when none ran."""
        if self._last is None:
            return False
        (known, name), self._last = self._last, None
        self.give_up(known, name, reason)
        demoted = self._demoted[known]
        if any(c.lowering is not None and c.name not in demoted for c in self._ranked[known]):
            return True
        del self._demoted[known]  # they all fail alike: what is wrong is not the lowering
        return False

    def give_up(self, known: NodeKind, name: str, reason: str) -> None:
        """From here on, ``choice`` passes over the lowering ``name`` for blocks of this kind."""
        self._demoted.setdefault(known, {})[name] = reason

    @property
    def notes(self) -> list[str]:
        """What was given up, in sentences for the certificate."""
        given_up = {n: why for demoted in self._demoted.values() for n, why in demoted.items()}
        return [*self.remarks, *(f"lowering {n} was given up: {why}" for n, why in given_up.items())]

    def _run_experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec
    ) -> Tensor | None:
        if x.dtype == torch.float64 or weights.dtype == torch.float64 or type(x) is not Tensor:
            return None  # the float64 oracle of the rewritten code: the op's own definition answers
        key = (id(bank), x.dtype, weights.dtype, ids.shape[1])
        if key not in self._sessions:
            router = self._routers.get(id(bank))
            site = ExpertsNode("experts", bank_of(bank, spec), spec, x.dtype, int(ids.shape[1]), weights.dtype, router)
            self.check(site)
            site = self.legalize(site)
            lowering = self.lowering(site)
            self._sessions[key] = (self.open_session(site, lowering), site, bank)
            self._last = kind(site), lowering.name
        session, site, _ = self._sessions[key]
        feeds = {"x": x.to(site.dtype), "ids": ids.to(torch.int64), "weights": weights.to(site.weights_dtype)}
        return session.run(feeds)[0].to(x.device, dtypes(x, spec)[2])


def kind(site: ExpertsNode) -> NodeKind:
    """What a lowering's fitness depends on: the function, the sizes and the dtypes, and not the weights."""
    bank = site.bank
    if isinstance(site.spec, RowFunction):
        return (site.spec, bank.num_experts, site.top_k, site.dtype, site.weights_dtype, site.router)
    shapes: object = getattr(bank, "format", None)  # of quantised experts, with the formats
    if shapes is None:
        shapes = tuple(tuple(w.shape) for w in (*bank.w_in(0), bank.w_out(0)))
    return (
        dataclasses.astuple(site.spec),
        bank.num_experts,
        site.top_k,
        shapes,
        site.dtype,
        site.weights_dtype,
        site.router,
    )
