"""One reading of a router: replayed on fresh logits, and compared with the routers that a RouterSpec can name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from moeopt.capture.op_kinds import is_factory, is_pointwise, moves_rows, op_name
from moeopt.capture.replay import ancestors, between, replay
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.specs import RouterSpec
from moeopt.recognise.router_compare import (
    EPS64,
    compare_routing,
    dense_table,
    fresh_logits,
    holds_value,
    is_floating,
    widens,
)
from moeopt.recognise.routing_types import Extraction

if TYPE_CHECKING:
    from moeopt.recognise.router import RoutingReader


_EXPONENTIALS = ("_softmax", "softmax", "_log_softmax", "log_softmax", "exp", "exp2")


_SELECTIONS = ("topk", "sort", "argsort", "max", "argmax")


_ROW_OPS = (*_EXPONENTIALS, *_SELECTIONS, "amax", "sum", "logsumexp", "one_hot", "scatter_add", "linalg_vector_norm")


def run_extraction(extraction: Extraction, tape: Tape, env: dict[fx.Node, Any], ids: Tensor | None) -> Tensor:
    values = [env[node] if node in env else tape.value(node) for node in extraction.nodes]
    return extraction.of(values, ids)


@dataclass
class RouterView:
    """One reading: ``logits`` has its experts on ``axis``; ``beside`` names a Parameter that enters after it."""

    routing: RoutingReader
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
        """The nodes among ``nodes`` by which the weights' values (not just their places) are computed."""
        inside, stack, seen = set(self.nodes), list(self.routing.weights.nodes), set[Any]()
        while stack:
            node = stack.pop()
            if node in inside and node not in seen:
                seen.add(node)
                stack.extend(a for a in node.all_input_nodes if is_floating(a))
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
            env |= replay(self.routing.tape, [node], env, exact) if exact is None or not widens(node) else {
                node: torch.softmax(env[node.args[0]], node.args[1])  # type: ignore[index, arg-type]
            }  # fmt: skip
        return env, *self.routing.answer(env)

    @cached_property
    def fresh(self) -> list[Tensor]:
        """The probe call's own logits, then made-up ones, (T, E) each."""
        like = self.routing.tape.value(self.logits)
        own = like.movedim(self.axis, -1).reshape(self.tokens, self.width)
        return [own, *(t.to(own) for t in fresh_logits(self.tokens, self.width, torch.finfo(own.dtype).max))]

    @cached_property
    def plain(self) -> tuple[Tensor, dict[fx.Node, Any], Tensor, Tensor]:
        """Ordinary logits, with what they give."""
        return self.fresh[1], *self.replayed(self.fresh[1])

    @cached_property
    def top_k(self) -> int:
        _, _, ids, weights = self.plain
        return int(dense_table(ids, weights, self.width)[1].sum(1).max())

    @property
    def dense(self) -> bool:
        """Every expert has its weight, and none was selected."""
        return self.top_k == self.width and not any(op_name(n) in _SELECTIONS for n in self.nodes)

    @cached_property
    def softmaxes(self) -> list[fx.Node]:
        """Nodes on the way to the weights that hold the softmax over all experts."""
        logits_TE, env, _, _ = self.plain
        want = torch.softmax(logits_TE.double(), -1)
        return [n for n in self.path if holds_value(env[n], want, self.axis)]

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
        if not bool(torch.stack(compare_routing((logits_TE, ids, weights), spec, self.eps, 8)).any(0).all()):
            return False  # most readings already differ here
        exact, tied = compare_routing(self.rounded, spec, self.eps, 8)
        if not bool((exact | tied).all()) or 2 * int(exact.sum()) <= len(exact):
            return False
        exact, tied = compare_routing(self.pure, dataclasses.replace(spec, dtype=None), max(self.eps, EPS64), 0.05)
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
        return ("nearly " if claimable else "") + ", ".join(
            words
        )  # the reading held for ordinary logits only: extreme ones, or an epsilon, make a difference


_SCORES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("softmax", lambda l_TE: torch.softmax(l_TE, -1)),
    ("sigmoid", torch.sigmoid),
    ("sqrt softplus", lambda l_TE: torch.nn.functional.softplus(l_TE).sqrt()),
    ("tanh", torch.tanh),
)


_FAVOURITE = 7
"""Which of the fresh logits have one expert that every token prefers."""
