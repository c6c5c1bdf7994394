"""Ties: tokens whose choice of experts rounding decides, told from tokens that a wrong router sends elsewhere.

Between equal scores each runtime chooses by its own rule: PyTorch's top-k takes experts 6 and 5 of eight equal
ones, ONNX Runtime's takes 0 and 1. Neither is wrong. A choice is *tied* where the nearest two scores of which one
was chosen and the other was not lie closer than rounding explains: ``TIE`` eps of the row's largest score, and
``FACTOR`` times what the scores themselves move by when the inputs are moved by one rounding error.

Shape legend: T tokens, K chosen per token, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.experts import experts
from moeopt.ops.override import default_impl, override_experts_impl
from moeopt.rewrite.site_names import site_names
from moeopt.value_types import PyObject
from moeopt.verification.judge import FACTOR
from moeopt.verification.model import run_plain
from moeopt.verification.pins import RoutingLog
from moeopt.verification.routing import TIE
from moeopt.verification.selections import Event


@dataclass
class RoutedCall:
    """What one call of the experts' op was given, and the routing choices made since the call before.

    ``ids`` (T, K) int64, ``weights`` (T, K).
    """

    name: str
    ids: Tensor
    weights: Tensor
    events: list[Event]


def choices_of(
    model: nn.Module, args: PyObject, kwargs: PyObject, pinned: dict[str, Tensor] | None = None
) -> tuple[Any, list[RoutedCall]]:
    """Outputs of a model whose blocks were rewritten, and each site's choice.

    Args:
        pinned: expert ids (T, K) by site: the model runs with these, each choice still told as the router makes it.
            Where a site's ids are not those of one top-k, only its experts run with them, an expert that is named
            instead of another with the weight of that one.
    """
    if pinned:
        return _run(model, args, kwargs, pinned, _pins(_run(model, args, kwargs, {}, {})[1], pinned))
    return _run(model, args, kwargs, {}, {})


def _pins(choices: Sequence[RoutedCall], pinned: Mapping[str, Tensor]) -> dict[int, Callable[[Tensor], Tensor]]:
    """For the log: the choice that gave each site its ids, alone or as the first of more (a top-k of one beyond for a
    threshold, a whole order), so that all that reads it sees the pinned ones."""
    found: dict[int, Callable[[Tensor], Tensor]] = {}
    number = 0
    for choice in choices:
        ids = pinned.get(choice.name)
        for event in choice.events:
            if ids is not None and event.ids.numel() >= ids.numel() > 0 and event.ids.numel() % len(ids) == 0:
                own = event.ids.reshape(len(ids), -1)
                if torch.equal(own[:, : ids.shape[1]], choice.ids):
                    found[number] = functools.partial(_pinned, ids)
            number += 1
    return found


def _pinned(ids_TK: Tensor, original: Tensor) -> Tensor:
    """``original`` (T, K or more, the best first) with ``ids_TK`` in front; what they displace takes their places
    behind."""
    own = original.reshape(len(ids_TK), -1)
    kept = own[:, : ids_TK.shape[1]]
    front, rest = in_place_of(kept, ids_TK.to(own)), own[:, ids_TK.shape[1] :].clone()
    for t in (front != kept).any(-1).nonzero().flatten().tolist() if rest.numel() else ():
        gone = [e for e in kept[t].tolist() if e not in front[t].tolist()]
        rest[t] = torch.tensor([gone.pop(0) if e in front[t].tolist() and gone else e for e in rest[t].tolist()])
    return torch.cat([front, rest], -1).reshape(original.shape)


def _run(
    model: nn.Module,
    args: PyObject,
    kwargs: PyObject,
    pinned: Mapping[str, Tensor],
    pins: dict[int, Callable[[Tensor], Tensor]],
) -> tuple[Any, list[RoutedCall]]:
    name_of = site_names(model)
    log = RoutingLog(pins)
    found: list[RoutedCall] = []
    before = 0

    def note(x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor | None:
        nonlocal before
        name = name_of(bank)
        if name is None:
            return None
        own = ids.detach().long().clone()
        events = log.events[before:]
        pinned_here = [e.ids for n, e in enumerate(events, before) if n in pins]
        by_itself = [chosen.reshape(len(own), -1)[:, : own.shape[1]] for chosen in pinned_here]
        found.append(RoutedCall(name, by_itself[-1] if by_itself else own, weights.detach().clone(), events))
        before = len(log.events)
        other = pinned.get(name)
        if other is None or other.shape != ids.shape:
            return None
        with default_impl():
            return experts(x, in_place_of(own, other.to(own)).to(ids.dtype), weights, bank, spec)

    with override_experts_impl(note), log:
        outputs = run_plain(model, args, kwargs)
    return outputs, found


def in_place_of(own_TK: Tensor, other_TK: Tensor) -> Tensor:
    """``other_TK``'s ids in the order of ``own_TK``: shared ids keep their place, the rest fill the others in order."""
    if torch.equal(own_TK, other_TK):
        return own_TK
    result = own_TK.clone()
    for t in (own_TK.sort(-1).values != other_TK.sort(-1).values).any(-1).nonzero().flatten().tolist():
        own, other = own_TK[t].tolist(), other_TK[t].tolist()
        new = [e for e in other if e not in own]
        result[t] = torch.tensor([e if e in other or not new else new.pop(0) for e in own])
    return result


def differing(choice: RoutedCall, ids_TK: Tensor) -> Tensor:
    """(T,) bool: which tokens another run with ``ids_TK`` sends elsewhere, experts of weight zero left out."""
    shared = (choice.ids[:, :, None] == ids_TK.to(choice.ids)[:, None, :]).any(-1)
    return (~shared & _counts(choice.weights)).any(-1)


def tied_tokens(choice: RoutedCall, eps: float, noisy: Sequence[RoutedCall] = ()) -> tuple[Tensor, Tensor]:
    """Two (T,) bool: whose choice rounding decides, and whose scores are exactly equal.

    Args:
        eps: of the coarsest dtype in which scores may have been computed.
        noisy: the same choice under rounding noise.
    """
    T = len(choice.ids)
    tied, exact = (torch.zeros(T, dtype=torch.bool) for _ in range(2))
    for number, event in enumerate(choice.events):
        assert event.scores is not None
        scores = event.scores.reshape(-1, event.scores.shape[-1]).double().cpu()
        if len(scores) != T or scores.shape[-1] < 2:
            continue  # a choice of something else: inside a group of experts, of tokens
        gap, equal = _gap(scores, event.ids.reshape(T, -1).cpu(), choice)
        finite = torch.where(scores.isfinite(), scores.abs(), 0.0)
        allowed = TIE * max(eps, torch.finfo(event.scores.dtype).eps) * finite.amax(-1)
        allowed += torch.finfo(event.scores.dtype).tiny
        for other in noisy:
            twin = other.events[number].scores if number < len(other.events) else None
            if twin is not None and twin.numel() == scores.numel():
                moved = (twin.reshape(scores.shape).double().cpu() - scores).abs()
                allowed = torch.maximum(allowed, FACTOR * torch.where(moved.isfinite(), moved, 0.0).amax(-1))
        tied |= (gap <= allowed) | scores.isnan().any(-1)
        exact |= equal
    for other in noisy:
        if other.ids.shape == choice.ids.shape:
            same = _effective(other) == _effective(choice)
            tied |= ~same.all(-1)
    return tied, exact


def equal_scores(choice: RoutedCall) -> Tensor:
    """(T,) bool: rows on which the router gives every expert the same score, as a gate of zeros does."""
    T = len(choice.ids)
    found = torch.zeros(T, dtype=torch.bool)
    for event in choice.events:
        assert event.scores is not None
        scores = event.scores.reshape(-1, event.scores.shape[-1]).cpu()
        if len(scores) == T and scores.shape[-1] > 1:
            found |= (scores == scores[:, :1]).all(-1)
    return found


def _gap(scores_TE: Tensor, ids: Tensor, choice: RoutedCall) -> tuple[Tensor, Tensor]:
    """How near the nearest chosen and not chosen scores of each token are, and whether two are equal, in effect."""
    T, E = scores_TE.shape
    site = choice.ids.cpu()
    inside = bool((site < E).all())
    if ids.shape[1] == E:
        ids = site  # a whole order, of which the site took a part
    chosen = torch.zeros(T, E + 1, dtype=torch.bool).scatter_(1, ids.clamp(max=E), True)[:, :E]  # from E on: nothing
    matters = chosen.clone()
    if inside and ids.shape == site.shape and torch.equal(ids.sort(-1).values, site.sort(-1).values):
        matters = torch.zeros(T, E, dtype=torch.bool).scatter_(1, site, _counts(choice.weights).cpu())
    order = scores_TE.argsort(-1)
    s, c, m = (t.gather(1, order) for t in (scores_TE, chosen, matters))
    apart = torch.where(s[:, 1:] == s[:, :-1], 0.0, s[:, 1:] - s[:, :-1])
    edge = c[:, 1:] != c[:, :-1]
    gap = torch.where(edge, apart, torch.inf).amin(-1)
    # Equal scores stand in any order here: the tie matters where any chosen one of them does.
    level = torch.where(edge & (apart == 0), s[:, 1:], -torch.inf).amax(-1)
    equal = (edge & (apart == 0)).any(-1) & (m & (s == level[:, None])).any(-1)
    return gap, equal


def _counts(weights: Tensor) -> Tensor:
    """Which routing weights are more than nothing; of a token whose weights are NaN, none: it chooses nothing."""
    return weights.abs() > torch.finfo(weights.dtype).tiny


def _effective(choice: RoutedCall) -> Tensor:
    return torch.where(_counts(choice.weights), choice.ids, -1).sort(-1).values


def exactly_tied(events: Sequence[Event]) -> bool:
    """Whether any of these choices was made between equal scores."""
    for event in events:
        assert event.scores is not None
        scores = event.scores.reshape(-1, event.scores.shape[-1]).double().cpu()
        ids = event.ids.reshape(len(scores), -1).cpu()
        if scores.shape[-1] > 1 and bool(_gap(scores, ids, RoutedCall("", ids, torch.ones(ids.shape), []))[1].any()):
            return True
    return False
