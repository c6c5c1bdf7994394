"""Softmax routers, recognised by value: which (T, E) tensor are the logits, and which ``RouterSpec`` they go through.

    softmax_topk   p = softmax(l over E);  w, ids = topk(p);   renormalised: w / sum(w)
    topk_softmax   top, ids = topk(l);     w = softmax(top over K)

A spec is claimed for the earliest tensor ``l`` from which ``moeopt.ops.route`` gives the block's own ids and weights
on the probe call and on fresh logits (tiny, large, all negative, one favourite for all tokens), replayed through the
graph that was recorded. How it is written does not matter: ``topk`` or ``sort``, gathered or scattered weights, a
softmax masked with minus infinity, ``exp`` and a division. softmax_topk renormalised equals topk_softmax (the
denominator cancels); it is called softmax_topk where a tensor on the way to the weights holds the softmax over
all E. ``dtype`` is that of the softmax. What comes before ``l`` (bias, temperature, softcap, clamp) is the logits'
own business. Ids are compared as sets; experts whose logits round to one probability may stand in for each other.

Refused, so the router stays an opaque sub-graph: another score (sigmoid), a scale or an epsilon that shows, a
Parameter or buffer after the logits (a correction bias, even one of zeros), anything else from the input, groups,
capacity or cumulative sums, random numbers, values read by Python on the way, equal weights, and no top-k at all.
Those are described in words where a known score of some logits gives the weights.

Shape legend: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from moeopt.capture.op_kinds import is_factory
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.ir.specs import RouterSpec
from moeopt.recognise.ids_of_masks import table_to_ids
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router_view import RouterView, run_extraction
from moeopt.recognise.routing_by_sum import SumOfCodes
from moeopt.recognise.routing_types import Extraction, RoutingForm


@dataclass(frozen=True)
class RouterReading:
    """What was found: ``spec`` and ``logits`` (a node of the tape), or None and the ``reason``; ``text`` either way.

    ``outside``: ids and weights came in as arguments, so there was no router to read.
    """

    text: str
    spec: RouterSpec | None = None
    reason: str = ""
    logits: fx.Node | None = None
    outside: bool = False

    def encode(self) -> str:
        """The spec as one line of JSON; "" when there is none."""
        fields = dataclasses.asdict(self.spec) if self.spec is not None else None
        return "" if fields is None else json.dumps(fields, separators=(",", ":"))


def recognize_router(tape: Tape, recognition: Recognition) -> RouterReading:
    """Read the router of recognised experts on a tape whose choices were not steered. Never raises."""
    return _read(tape, recognition.routing.ids, recognition.routing.weights, recognition)


def recognize_outer_router(tape: Tape, module: nn.Module, recognition: Recognition) -> RouterReading:
    """The same where ids and weights are arguments of ``module``, which ``tape``'s root calls. Never raises."""
    call = next((c for c in tape.calls if c.module is module), None)
    given = leaves_of(fx.Node, (call.args, call.kwargs)) if call is not None else []

    def outside(extraction: Extraction | None) -> Extraction | None:
        number = (
            extraction.source.name.removeprefix("input_")
            if extraction is not None and extraction.source is not None
            else ""
        )
        known = number.isdigit() and int(number) < len(given) and extraction is not None and not extraction.beside
        return Extraction(given[int(number)], extraction.steps) if extraction is not None and known else None

    ids, weights = outside(recognition.routing.ids), outside(recognition.routing.weights)
    if call is None or weights is None or (ids is None) != (recognition.routing.ids is None):
        return _given(recognition)
    return _read(tape, ids, weights, recognition, call.first)


def _given(recognition: Recognition) -> RouterReading:
    if recognition.routing.form.given:
        return RouterReading(_plain_words(recognition), None, "the mask is an argument of the module", outside=True)
    words = f"ids and weights given from outside, top-{recognition.routing.top_k} of {len(recognition.experts)}"
    return RouterReading(words, None, "ids and weights are arguments of the module", outside=True)


def same_reading(readings: list[RouterReading], recognition: Recognition) -> RouterReading:
    """The reading that every probe call gave; words without a claim where they differ."""
    if all((r.text, r.spec) == (readings[0].text, readings[0].spec) for r in readings):
        return dataclasses.replace(
            readings[0], logits=None
        )  # a node would keep its tape alive, and the tape is dropped
    reason = next((r.reason for r in readings if r.reason), "two probe calls read it differently")
    return RouterReading(_plain_words(recognition), None, reason)


def _plain_words(recognition: Recognition) -> str:
    """What the routing alone says."""
    experts, k = len(recognition.experts), recognition.routing.top_k
    return {
        RoutingForm.IDS: f"opaque router, top-{k} of {experts}",
        RoutingForm.IDS_ALONE: f"top-{k} of {experts}, equal weights",
        RoutingForm.ONE_HOT: f"one-hot, {k} of {experts}",
        RoutingForm.ONE_HOT_ALONE: f"one-hot, {k} of {experts}, equal weights",
        RoutingForm.GIVEN_MASK: f"a mask over {experts} experts, given from outside",
        RoutingForm.GIVEN_MASK_ALONE: f"a mask over {experts} experts, given from outside, equal weights",
        RoutingForm.DENSE: f"all {experts} experts, weighted",
        RoutingForm.TABLE: f"sparse table over {experts} experts",
        RoutingForm.EVERY_GROUP: f"every one of {experts} groups",
    }[recognition.routing.form]


def _read(
    tape: Tape, ids: Extraction | None, weights: Extraction, recognition: Recognition, unvetted: int | None = None
) -> RouterReading:
    sources = [node for r in (ids, weights) if r is not None for node in r.places]
    if sources and all(s is not None and s.op == "placeholder" for s in sources):
        return _given(recognition)
    try:
        return RoutingReader(tape, ids, weights, len(recognition.experts), unvetted).read(_plain_words(recognition))
    except Declined as err:
        return RouterReading(_plain_words(recognition), None, err.reason)
    except Exception as err:  # a router that cannot be read must not stop its block from being rewritten
        return RouterReading(
            _plain_words(recognition), None, f"its graph does not replay ({type(err).__name__}: {err})"[:300]
        )


_NO_LOGITS = "no tensor of one float per token and expert decides both ids and weights"


@dataclass
class RoutingReader:
    """ids and weights of one tape, to be seen as a function of some logits on it.

    ``unvetted``: up to which node Python must have read nothing; None where recognition has judged what it read,
    and only reads of the logits before ids and weights stand count.
    """

    tape: Tape
    ids: Extraction | None
    weights: Extraction
    experts: int
    unvetted: int | None

    @cached_property
    def sources(self) -> list[fx.Node]:
        return [node for r in (self.ids, self.weights) if r is not None for node in r.nodes]

    def answer(self, env: dict[fx.Node, Any]) -> tuple[Tensor, Tensor]:
        """(ids, weights), (T, K) each, over replayed values; ids that name no expert have no weight."""
        ids = run_extraction(self.ids, self.tape, env, None).long() if self.ids is not None else None
        weights = run_extraction(self.weights, self.tape, env, ids)
        return (table_to_ids(weights) if ids is None else ids), weights.double()

    def read(self, plain: str) -> RouterReading:
        if isinstance(self.weights, SumOfCodes):
            raise Declined("no tensor holds its weights")
        if self.weights.source is None:
            raise Declined("every chosen expert has the same weight")
        ids, _ = self.answer({})
        if not ids.numel():
            raise Declined("no token was routed")
        if any(node.meta.get("random") for node in ancestors(self.sources)):
            raise Declined("it draws random numbers")
        views = list(self._views(ids))
        reasons = []
        for view in views:
            try:
                spec = view.spec()
                return RouterReading(str(spec), spec, "", view.logits)
            except Declined as err:
                reasons.append((bool(view.beside), err.reason))
        words = next(filter(None, (v.words() for v in views[:8])), plain)
        nearest = min(reasons, key=lambda r: r[0])[1] if reasons else _NO_LOGITS
        return RouterReading(words, None, nearest)

    def read_by_python(self) -> list[fx.Node]:
        """What Python turned into numbers before ids and weights stood."""
        end = max(n.meta["index"] for n in self.sources) if self.unvetted is None else self.unvetted
        return [r.node for r in self.tape.reads if r.node.meta["index"] < end]

    def _views(self, ids: Tensor) -> Iterator[RouterView]:
        """Every tensor that could be the logits, the earliest first."""
        tokens = ids.shape[0]
        widths = [self.experts]
        beyond = self.ids is not None and int(ids.max()) >= self.experts
        before = ancestors(self.sources)
        for node in self.tape.nodes:
            shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
            if node not in before or not shape or len(shape) < 2 or dtype is None or not dtype.is_floating_point:
                continue
            if beyond and shape[-1] > int(ids.max()) and math.prod(shape) == tokens * shape[-1]:
                widths = [shape[-1]]  # ids beyond the experts: the logits have a column for each of them
            for width in widths:
                if (
                    width in shape
                    and math.prod(shape) == tokens * width
                    and node.op in ("call_function", "placeholder")
                ):
                    outside = self._beside(node)
                    if outside is not None:
                        axis = len(shape) - 1 - shape[::-1].index(width)
                        yield RouterView(self, node, axis, tokens, width, outside)

    def _beside(self, logits: fx.Node) -> str | None:
        """The Parameter or buffer that enters after ``logits``, "" for none; None where the input does as well."""
        stack, seen, found = list(self.sources), {logits}, ""
        while stack:
            node = stack.pop()
            if node in seen or is_factory(node):
                continue
            seen.add(node)
            if node.op == "placeholder":
                return None
            if node.op == "get_attr" and node.meta.get("constant") is None:
                found = str(node.target)
            stack.extend(node.all_input_nodes)
        return found
