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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeopt.capture.op_kinds import is_factory, is_pointwise, moves_rows, op_name
from moeopt.capture.replay import ancestors, between, replay
from moeopt.capture.tape import Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.ir.specs import RouterSpec
from moeopt.ops.route import route
from moeopt.recognise.experts import Recognition
from moeopt.recognise.routing import Extraction, RoutingForm, side_by_side, table_to_ids


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
        return dataclasses.replace(readings[0], logits=None)  # the node of one tape, which goes
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
    if all(s is not None and s.op == "placeholder" for s in sources):
        return _given(recognition)
    try:
        return _Routing(tape, ids, weights, len(recognition.experts), unvetted).read(_plain_words(recognition))
    except Declined as err:
        return RouterReading(_plain_words(recognition), None, err.reason)
    except Exception as err:  # a router that cannot be read must not stop its block from being rewritten
        return RouterReading(
            _plain_words(recognition), None, f"its graph does not replay ({type(err).__name__}: {err})"[:300]
        )


_NO_LOGITS = "no tensor of one float per token and expert decides both ids and weights"
_EXPONENTIALS = ("_softmax", "softmax", "_log_softmax", "log_softmax", "exp", "exp2")
_SELECTIONS = ("topk", "sort", "argsort", "max", "argmax")
_ROW_OPS = (*_EXPONENTIALS, *_SELECTIONS, "amax", "sum", "logsumexp", "one_hot", "scatter_add", "linalg_vector_norm")


@dataclass
class _Routing:
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
        ids = _run(self.ids, self.tape, env, None).long() if self.ids is not None else None
        weights = _run(self.weights, self.tape, env, ids)
        return (table_to_ids(weights) if ids is None else ids), weights.double()

    def read(self, plain: str) -> RouterReading:
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

    def _views(self, ids: Tensor) -> Iterator[_View]:
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
                        yield _View(self, node, axis, tokens, width, outside)

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


def _run(extraction: Extraction, tape: Tape, env: dict[fx.Node, Any], ids: Tensor | None) -> Tensor:
    values = [env[node] if node in env else tape.value(node) for node in extraction.nodes]
    value = side_by_side(values) if extraction.beside else values[0]
    for op, rest in extraction.steps:
        value = op(value, *(ids if a == "@ids" else a for a in rest))
    return value  # type: ignore[no-any-return]


@dataclass
class _View:
    """One reading: ``logits`` has its experts on ``axis``; ``beside`` names a Parameter that enters after it."""

    routing: _Routing
    logits: fx.Node
    axis: int
    tokens: int
    width: int
    beside: str

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """What lies between the logits and the answer, in order."""
        found = {n for s in self.routing.sources for n in between(self.routing.tape, [self.logits], s)}
        return sorted(found, key=lambda n: n.meta["index"])

    @cached_property
    def path(self) -> list[fx.Node]:
        """Those of ``nodes`` by which the weights' values (not just their places) are computed."""
        inside, stack, seen = set(self.nodes), list(self.routing.weights.nodes), set[Any]()
        while stack:
            node = stack.pop()
            if node in inside and node not in seen:
                seen.add(node)
                stack.extend(a for a in node.all_input_nodes if _floating(a))
        return [n for n in self.nodes if n in seen]

    @cached_property
    def eps(self) -> float:
        """The coarsest rounding on the way."""
        dtypes = [n.meta["dtype"] for n in self.nodes if n.meta.get("dtype") is not None]
        return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=0.0)

    def replayed(self, logits_TE: Tensor) -> tuple[dict[fx.Node, Any], Tensor, Tensor]:
        """The nodes' values over other logits, and ids and weights (T, K); in float64 for float64 logits."""
        like = self.routing.tape.value(self.logits)
        moved = logits_TE.reshape(like.movedim(self.axis, -1).shape).movedim(-1, self.axis)
        env = {self.logits: torch.empty_like(like, dtype=logits_TE.dtype).copy_(moved)}
        exact = torch.float64 if logits_TE.dtype == torch.float64 else None
        for node in self.nodes:
            env |= replay(self.routing.tape, [node], env, exact) if exact is None or not _widens(node) else {
                node: torch.softmax(env[node.args[0]], node.args[1])  # type: ignore[index, arg-type]
            }  # fmt: skip
        return env, *self.routing.answer(env)

    @cached_property
    def fresh(self) -> list[Tensor]:
        """The probe call's own logits, then made-up ones, (T, E) each."""
        like = self.routing.tape.value(self.logits)
        own = like.movedim(self.axis, -1).reshape(self.tokens, self.width)
        return [own, *(t.to(own) for t in _fresh(self.tokens, self.width, torch.finfo(own.dtype).max))]

    @cached_property
    def plain(self) -> tuple[Tensor, dict[fx.Node, Any], Tensor, Tensor]:
        """Ordinary logits, with what they give."""
        return self.fresh[1], *self.replayed(self.fresh[1])

    @cached_property
    def top_k(self) -> int:
        _, _, ids, weights = self.plain
        return int(_table(ids, weights, self.width)[1].sum(1).max())

    @property
    def dense(self) -> bool:
        """Every expert has its weight, and none was selected."""
        return self.top_k == self.width and not any(op_name(n) in _SELECTIONS for n in self.nodes)

    @cached_property
    def softmaxes(self) -> list[fx.Node]:
        """Nodes on the way to the weights that hold the softmax over all experts."""
        logits_TE, env, _, _ = self.plain
        want = torch.softmax(logits_TE.double(), -1)
        return [n for n in self.path if _holds(env[n], want, self.axis)]

    def spec(self) -> RouterSpec:
        """The spec that holds from these logits on.

        Raises:
            Declined: none does.
        """
        if self.beside:
            raise Declined(f"{self.beside} enters after the logits")
        self._refuse_python()
        self._refuse_ops()
        if not any(op_name(n) in _EXPONENTIALS for n in self.path):
            raise Declined("no softmax leads to the weights")
        if self.dense:
            raise Declined("it has no top-k")
        for score, renormalize, node in self._guesses():
            dtype = None if node.meta["dtype"] == self.logits.meta["dtype"] else str(node.meta["dtype"])[6:]
            spec = RouterSpec(score, self.top_k, self.width, renormalize, dtype)  # type: ignore[arg-type]
            if self._agrees(spec):
                return spec
        raise Declined("on other logits no softmax router gives its ids and weights")

    def _guesses(self) -> Iterator[tuple[str, bool, fx.Node]]:
        if self.softmaxes:
            yield "softmax_topk", False, self.softmaxes[-1]
            yield "softmax_topk", True, self.softmaxes[-1]
        first = next(n for n in self.path if op_name(n) in _EXPONENTIALS)
        yield "topk_softmax", False, first
        yield "softmax_topk", False, first

    def _refuse_python(self) -> None:
        vetted = self.routing.unvetted is None
        for node in self.routing.read_by_python():
            if any(n is self.logits if vetted else n.op == "placeholder" for n in ancestors([node])):
                raise Declined("Python reads a value before the routing is decided and may branch on it")

    def _refuse_ops(self) -> None:
        for node in self.nodes:
            known = moves_rows(node) or is_pointwise(node) or is_factory(node) or op_name(node) in _ROW_OPS
            shape = node.meta.get("shape")
            if not known or (shape is not None and not is_factory(node) and math.prod(shape) % self.tokens):
                raise Declined(f"{op_name(node)} may mix tokens")

    def _agrees(self, spec: RouterSpec) -> bool:
        """Whether it gives ids and weights to rounding, and without rounding by less than rounding can hide."""
        logits_TE, _, ids, weights = self.plain
        if not bool(torch.stack(_compare((logits_TE, ids, weights), spec, self.eps, 8)).any(0).all()):
            return False  # most guesses end here
        exact, tied = _compare(self.rounded, spec, self.eps, 8)
        if not bool((exact | tied).all()) or 2 * int(exact.sum()) <= len(exact):
            return False
        exact, tied = _compare(self.pure, dataclasses.replace(spec, dtype=None), max(self.eps, _EPS64), 0.05)
        return bool((exact | tied).all())

    @cached_property
    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, ids, weights) of all fresh logits together."""
        return self._together(self.fresh)

    @cached_property
    def pure(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in float64."""
        return self._together([t.double() for t in self.fresh[1:]])

    @cached_property
    def ordinary(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for those at which a description is read off."""
        return self._together([self.fresh[i].double() for i in (1, 2, _FAVOURITE)])

    def _together(self, fresh: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        answers = [self.replayed(logits_TE)[1:] for logits_TE in fresh]
        return torch.cat(fresh), torch.cat([ids for ids, _ in answers]), torch.cat([w for _, w in answers])

    def words(self) -> str:
        """The router in words, where a known score of these logits gives the weights; "" where not."""
        try:
            self._refuse_python()
        except Declined:
            return ""
        if self._constant():
            return f"top-{self.top_k} of {self.width}, equal weights"
        for name, score in _SCORES:
            for renormalize in (False, True):
                scale = self._scale(score, renormalize)
                if scale is not None:
                    return self._words(name, score, renormalize, scale)
        return ""

    def _constant(self) -> bool:
        weights = self.ordinary[2]
        return bool((weights == weights[0, 0]).all())

    def _scale(self, score: Callable[[Tensor], Tensor], renormalize: bool) -> float | None:
        """By what the score at the chosen places has to be multiplied to give the weights, if by one number."""
        logits_TE, ids, weights = self.ordinary
        if int(ids.max()) >= self.width:
            return None
        base = score(logits_TE).gather(1, ids)
        ratio = weights / (base / base.sum(1, keepdim=True) if renormalize else base)
        scale = float(ratio.median())
        return scale if scale > 0 and bool(((ratio / scale - 1).abs() <= 1e-5).all()) else None

    def _words(self, name: str, score: Callable[[Tensor], Tensor], renormalize: bool, scale: float) -> str:
        logits_TE, ids, _ = self.ordinary
        dense = self.dense
        words = [f"dense {name} over {self.width}"] if dense else [name, f"top-{self.top_k} of {self.width}"]
        key = score(logits_TE).topk(self.top_k).indices
        if renormalize and (not dense or name != "softmax"):
            words.append("renormalised")
        if abs(scale - 1) > 1e-5:
            words.append(f"scaled by {scale:.6g}")
        if not torch.equal(key.sort(1).values, ids.sort(1).values):
            words.append("chosen by another key")
        if self.beside:
            words.append("with parameters of its own")
        claimable = name == "softmax" and not dense and words[2:] in ([], ["renormalised"])
        return ("nearly " if claimable else "") + ", ".join(words)  # it was not claimed: extreme logits, an epsilon


_SCORES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("softmax", lambda l_TE: torch.softmax(l_TE, -1)),
    ("sigmoid", torch.sigmoid),
    ("sqrt softplus", lambda l_TE: torch.nn.functional.softplus(l_TE).sqrt()),
    ("tanh", torch.tanh),
)


_EPS64 = torch.finfo(torch.float64).eps
_FAVOURITE = 7
"""Which of the fresh logits have one expert that every token prefers."""


def _widens(node: fx.Node) -> bool:
    """A softmax that takes 16-bit logits and gives float32 (CUDA's), which refuses float64."""
    return op_name(node) == "_softmax" and len(node.args) > 2 and node.args[2] is True


def _floating(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is None or bool(dtype.is_floating_point)


def _fresh(tokens: int, width: int, largest: float) -> Iterator[Tensor]:
    """Logits of every sort: ordinary first, then tiny, far from zero on both sides, one favourite, of all sizes."""
    generator = torch.Generator().manual_seed(5)

    def draw() -> Tensor:
        return torch.randn(tokens, width, generator=generator)

    yield draw()
    yield draw() * 3
    yield draw() * 0.01
    yield draw() * 12
    yield draw() * 3 - 60
    yield draw() * 3 + 200
    yield draw() + 20 * (torch.arange(width) == width // 2)
    yield draw() * 10.0 ** torch.randint(
        -2, round(math.log10(min(largest, 1e9))) - 1, (tokens, width), generator=generator
    )


def _holds(value: Any, want: Tensor, axis: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != want.numel():
        return False
    if value.dim() <= axis or value.shape[axis] != want.shape[1]:
        axis = value.dim() - 1
    got = value.movedim(axis, -1)
    if got.shape[-1] != want.shape[1]:
        return False
    slack = 4 * torch.finfo(value.dtype).eps * (1 - want.log()) * want
    return bool(((got.reshape(want.shape).double() - want).abs() <= slack).all())


def _table(ids: Tensor, weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(T, E) weights and choices; an id beyond the experts is dropped, one named twice is not a number."""
    ids = ids.clamp(max=width)
    count = torch.zeros(len(ids), width + 1, dtype=torch.float64).scatter_add(1, ids, torch.ones_like(weights))
    table = torch.zeros(len(ids), width + 1, dtype=torch.float64).scatter(1, ids, weights)
    table = torch.where(count > 1, torch.nan, table)
    return table[:, :width], count[:, :width] > 0


def _compare(got: tuple[Tensor, Tensor, Tensor], spec: RouterSpec, eps: float, budget: float) -> tuple[Tensor, Tensor]:
    """(T,) which tokens the spec routes as (logits, ids, weights) say, and which differ by a tie alone.

    Each weight may be off by ``budget`` roundings of itself and of its logarithm (log_softmax and exp); a choice by
    experts whose logits the softmax rounds to one probability.
    """
    logits_TE, ids, weights = got
    table, chosen = _table(ids, weights, spec.num_experts)
    want_ids, want = route(logits_TE, spec)
    ref, picked = _table(want_ids, want.double(), spec.num_experts)
    wide_TE = logits_TE.double()
    slack = max(budget * eps, 64 * _EPS64) * (1 - ref.clamp(min=1e-300).log()) * ref + 2 * eps * _least(eps)
    near = (table - ref).abs() <= slack
    worst = torch.where(picked, wide_TE, torch.inf).amin(1, keepdim=True)
    alike = (wide_TE - worst).abs() <= 4 * eps * (1 + wide_TE.abs())
    swapped = chosen ^ picked
    sums = (table.sum(1) - ref.sum(1)).abs() <= 8 * eps * ref.sum(1).abs()
    exact = near.all(1)
    return exact, ~exact & torch.where(swapped, alike, near).all(1) & sums


def _least(eps: float) -> float:
    """The smallest normal number of the dtype with this epsilon; float16 is the one that has few."""
    return torch.finfo(torch.float16 if eps == torch.finfo(torch.float16).eps else torch.float32).tiny
