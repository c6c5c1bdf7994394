"""Kinds of faults that engines and twins have had: a feature that shows each, and what the fault does to a program.

``shows(p)`` says whether a program could show the fault; ``program`` is the simplest that does; ``spoiled(p)`` is the
model that a faulty compiler would hand out for it, so that the law is seen to catch the kind without a faulty compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.property import capacity, routers, surroundings
from tests.property.build import build
from tests.property.scores import SCORES
from tests.property.spec import Around, Expert, Program, Router


@dataclass(frozen=True)
class Fault:
    shows: Callable[[Program], bool]
    program: Program
    spoiled: Callable[[Program], Any]
    complaint: str
    backend: str = "onnxruntime"


class Patched(nn.Module):
    """A program's model that runs with one piece of the generator replaced."""

    def __init__(self, p: Program, patch: Callable[[], contextlib.AbstractContextManager]):
        super().__init__()
        self.patch = patch
        with patch():
            self.inner = build(p)

    def forward(self, *args):
        with self.patch():
            return self.inner(*args)


def with_score(name: str, coarse: Callable) -> Callable[[Program], nn.Module]:
    return lambda p: Patched(p, lambda: mock.patch.dict(SCORES, {name: coarse}))


def coarse_sigmoid(x):
    """As a clamped rational approximation computes it: absolute accuracy only."""
    return torch.where(x < -18, 0.0, (torch.tanh(x / 2) + 1) / 2)


def by_float_division(route, logits):
    index = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1])
    first = ((index * (index + 1) * 40009 + index).float() / 7).trunc().long().unsqueeze(-1)
    ids = (first + torch.arange(route.k)) % route.p.experts
    return ids, logits.softmax(-1).gather(-1, ids)


class LastOfEqual(Patched):
    """Picks the highest id among equal keys, where torch picks another."""

    def __init__(self, p: Program):
        super().__init__(p, contextlib.nullcontext)

    def forward(self, *args):
        topk = torch.topk

        def from_the_end(keys, k, dim=-1, **more):
            values, ids = topk(keys.flip(-1), k, dim=dim, **more)
            return torch.return_types.topk((values, keys.shape[-1] - 1 - ids))

        with mock.patch.object(torch.Tensor, "topk", from_the_end):
            return self.inner(*args)


class PlacesOfTheExample(capacity.Capacity):
    """The capacity of 14 tokens for any number of them."""

    def places(self, tokens: int) -> int:
        return super().places(14)


@contextlib.contextmanager
def frozen_places() -> Iterator[None]:
    with mock.patch.dict("tests.property.build.OUTSIDE", {"capacity": PlacesOfTheExample}):
        yield


def raises(p: Program) -> Any:
    raise AttributeError("'NoneType' object has no attribute 'size'")


def small_epsilon(p: Program) -> bool:
    return "1e-8" in p.around.norm or "1e-12" in p.around.norm


def scored(name: str) -> Callable[[Program], bool]:
    return lambda p: p.router.score == name and p.router.kind in ("score_topk", "score_bias_topk", "topk_score")


def with_layer(name: str, formula: Callable) -> Callable[[Program], nn.Module]:
    made = {name: lambda hidden: surroundings.Written(hidden, formula)}
    return lambda p: Patched(p, lambda: mock.patch.dict(surroundings.NORMS, made))


def mean_of_hidden(x):
    """Attention whose mask is the least number of float32: a query that sees nothing gets the mean of all values."""
    pairs = x.unflatten(-1, (-1, 2))
    hidden = torch.ones(pairs.shape[-2], pairs.shape[-2], device=x.device).triu()
    scores = pairs @ pairs.mT / 2**0.5 + hidden.to(x.dtype) * torch.finfo(torch.float32).min
    return x + (scores.softmax(-1) @ pairs).flatten(-2)


def by_the_largest(x):
    """A running logsumexp whose exponents are all measured from the largest of all."""
    most = x.amax(-1, keepdim=True)
    return x + 0.1 * ((x - most).exp().cumsum(-1).log() + most)


RENORMALISED = Router("score_topk", score="sigmoid", renormalize="sum+1e-20")
FAULTS: dict[str, Fault] = {
    "the epsilon of a norm is dropped": Fault(
        small_epsilon,
        Program(around=Around(norm="rms 1e-8")),
        lambda p: Patched(
            p,
            lambda: mock.patch.dict(
                surroundings.NORMS, {"rms 1e-8": lambda hidden: surroundings.Written(hidden, surroundings.rms(0.0))}
            ),
        ),
        "rows of 1e-5: output 0",
    ),
    "the epsilon of a renormalisation is dropped": Fault(
        lambda p: p.router.renormalize in ("sum+1e-9", "sum+1e-20"),
        Program(top_k=2, router=Router("score_topk", score="exp", renormalize="sum+1e-20", bias=True)),
        lambda p: build(replace(p, router=replace(p.router, renormalize="sum"))),
        "logits at -45: output 0",
    ),
    "a factor near one is dropped": Fault(
        lambda p: bool(p.around.near_one),
        Program(around=Around(near_one=0.999995)),
        lambda p: build(replace(p, around=replace(p.around, near_one=1.0))),
        "other: output 0",
    ),
    "a query that sees nothing gets a mean": Fault(
        lambda p: p.around.norm == "attention",
        Program(around=Around(norm="attention")),
        with_layer("attention", mean_of_hidden),
        "other: output 0",
    ),
    "prefixes of small numbers are lost": Fault(
        lambda p: p.around.norm == "running logsumexp",
        Program(around=Around(norm="running logsumexp")),
        with_layer("running logsumexp", by_the_largest),
        "output 0",
    ),
    "a NaN is lost in a maximum": Fault(
        lambda p: p.around.norm == "peaks",
        Program(around=Around(norm="peaks")),
        with_layer("peaks", lambda x: surroundings.peaks(x.nan_to_num(nan=-3e38))),
        "output 0",
    ),
    "a coarse sigmoid": Fault(
        scored("sigmoid"), Program(top_k=2, router=RENORMALISED), with_score("sigmoid", coarse_sigmoid), "logits at -45"
    ),
    "log(sigmoid(x)) for logsigmoid": Fault(
        scored("logsigmoid"),
        Program(top_k=2, router=Router("score_topk", score="logsigmoid", renormalize="sum")),
        with_score("logsigmoid", lambda x: torch.sigmoid(x).log()),
        "logits at 45: output 0",
    ),
    "log(1 + exp(x)) for log1p(exp(x))": Fault(
        scored("log1p_exp"),
        Program(top_k=2, router=Router("score_topk", score="log1p_exp", renormalize="sum")),
        with_score("log1p_exp", lambda x: torch.log(1 + torch.exp(x))),
        "logits at -12: output 0",
    ),
    "exp(x) - 1 for expm1": Fault(
        scored("expm1"),
        Program(top_k=2, router=Router("topk_score", score="expm1")),
        with_score("expm1", lambda x: torch.exp(x) - 1),
        "rows of 1e-5: output 0",
    ),
    "the gate of a shared expert is coarse": Fault(
        lambda p: p.around.shared == "gated",
        Program(top_k=2, router=Router("score_topk", score="exp", bias=True), around=Around(shared="gated")),
        lambda p: Patched(p, lambda: mock.patch.object(torch, "sigmoid", coarse_sigmoid)),
        "all gates at -20: output 0",
    ),
    "a trunc division of integers in float32": Fault(
        lambda p: p.router.kind == "position_by_division",
        Program(top_k=2, router=Router("position_by_division")),
        lambda p: Patched(p, lambda: mock.patch.dict(routers.SCORED, {"position_by_division": by_float_division})),
        "many rows: output 0",
    ),
    "tied rows go elsewhere in silence": Fault(
        lambda p: not p.outside and not p.around.norm and p.router.kind != "given",
        Program(experts=8, top_k=2, expert=Expert(bias_out=True)),
        LastOfEqual,
        "zero rows: 7 tied tokens go to other experts, and no note speaks of ties",
    ),
    "a budget that allows anything": Fault(
        lambda p: p.router.copied and p.router.linear,
        Program(experts=8, top_k=3, hidden=16, router=replace(RENORMALISED, linear=True, copied=True)),
        build,
        "which allows anything",
    ),
    "a constant of a float64 model is rounded to float32": Fault(
        lambda p: p.dtype == "float64" and (p.around.out_scale != 1.0 or p.expert.clamp != ""),
        Program(around=Around(out_scale=0.7), dtype="float64"),
        lambda p: build(replace(p, around=replace(p.around, out_scale=torch.tensor(0.7).item()))),
        "other: output 0",
    ),
    "sizes are frozen in silence": Fault(
        lambda p: p.outside == "capacity",
        Program(top_k=2, outside="capacity"),
        lambda p: Patched(p, frozen_places),
        "many rows: output 0",
    ),
    "a strided example crashes": Fault(
        lambda p: p.example in ("strided", "sliced", "expanded"),
        Program(around=Around(mask="absent", rank=3), example="strided"),
        raises,
        "AttributeError",
    ),
    "weights that are all one in the example are read at another place": Fault(
        lambda p: p.weight_on == "input" and p.top_k == 1 and p.router.renormalize.startswith("sum+"),
        Program(
            router=Router("score_topk", score="sigmoid", renormalize="sum+1e-9"),
            expert=Expert(bias_in=True, bias_out=True),
            weight_on="input",
        ),
        lambda p: build(replace(p, weight_on="output")),
        "logits at -45: output 0",
        backend="torch",
    ),
    "a configuration goes stale": Fault(
        lambda p: bool(p.config),
        Program(top_k=2, router=Router(renormalize="sum"), config="namespace"),
        lambda p: build(replace(p, config="")),
        "config.top_k = 1: output 0",
        backend="torch",
    ),
}
