"""By what each expert's row enters the sum: read off the combine by sending one-hot codes through it.

Everything between the experts' outputs and their sum is linear in those outputs and does the same to
every feature. So the tape from there on is replayed with expert c's rows set to the c-th unit vector:
row t of the sum then *is* the vector of weights w[t, c], bit for bit, however it was written
(index_add, masked assignment, cat and un-permute, einsum, stack and sum, a loop over slots).

Legend: T tokens, C candidates (experts), H output features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors, descendants, only_ways_out, replay
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.obstacles import Rank
from moeopt.recognise.gemm_sites import GemmSite
from moeopt.recognise.joined_results import decided_by_results, joins
from moeopt.recognise.rows_of_others import weighed_by_another
from moeopt.recognise.token_rows import rows_of

_MOST_SUMS = 32
"""Tensors that are read as weighted sums of some of the experts, to say why there is no one sum of all."""


@dataclass
class Labels:
    """What each out-site row is: ``token[site]`` and ``candidate[site]``, both (R,), -1 for padding.

    ``hidden[site]``: (R,) by what its operand rows were multiplied between the expert's matmuls, where they were.
    """

    token: dict[GemmSite, torch.Tensor]
    candidate: dict[GemmSite, torch.Tensor]
    tokens: int
    candidates: int
    hidden: dict[GemmSite, torch.Tensor] = field(default_factory=dict)

    def visits(self) -> torch.Tensor:
        """(T, C) how often expert c saw token t."""
        out = torch.zeros(self.tokens, self.candidates, dtype=torch.long)
        for site, token in self.token.items():
            keep = token >= 0
            out.index_put_(
                (token[keep], self.candidate[site][keep]), torch.ones(int(keep.sum()), dtype=torch.long), True
            )
        return out


@dataclass
class Combine:
    """``node`` equals ``base`` + sum over c of weights[t, c] * out[t, c]; ``axis`` as :func:`rows_of` takes it."""

    node: fx.Node
    axis: int
    weights: torch.Tensor
    base: torch.Tensor | None


class SeveralSums(Declined):
    """The experts' outputs meet in several sums, of which each has some of the experts."""

    rank = Rank.READING


class SumsOfGates(Declined):
    """The experts' outputs are summed several times, each time by another gate."""


def read_combine(tape: Tape, labels: Labels) -> Combine:
    """Find the tensor that sums the experts and the weights it sums them by.

    Raises:
        Declined: no later tensor is such a sum; the text says how near the nearest came.
    """
    sites = list(labels.token)
    out = sites[0].matrices[0].m
    nodes = descendants(tape, [s.node for s in sites])
    apart = _apart(tape, sites)
    nearest = "their outputs never meet in one tensor with a row per token" + apart
    held_together = only_ways_out(tape, [s.node for s in sites], nodes)
    for target in _meeting_points(sites, nodes):
        if target not in held_together:
            nearest = (
                "beside their sum something else (another gate, another layer) reads the result of single experts; add "
                "up in one sum whatever reads them, return or store single results only where they are needed, or "
                "leave the block as it is"
            )
            continue
        if math.prod(target.meta["shape"]) != labels.tokens * out:
            continue
        axes = _feature_axes(target.meta["shape"], out)
        for axis in axes:
            found = _read(tape, labels, target, axis)
            if isinstance(found, Combine):
                return found
            if axis == axes[0]:  # the others are sizes that happen to be the same
                nearest = found
    source = nodes[-1].meta.get("source") if nodes else sites[0].node.meta.get("source")
    if (join := joins(nodes, labels.tokens * out)) is not None:
        raise Declined(
            f"the experts' outputs are not combined by a weighted sum per token: {op_name(join)} puts them together "
            "over the experts, so all of them run for every token, and this block stays as it is",
            join.meta.get("source") or source,
        )
    if (sums := _sums_of_gates(tape, labels, nodes)) is not None:
        raise weighed_by_another({s.node for s in sites}, nodes) or SumsOfGates(
            "its experts' outputs are summed several times, each time by another gate (one for each task, over the "
            "same experts or some of them), and the op gives one sum; give each gate experts of its own, or leave the "
            "block as it is: each of its experts runs once, for all gates",
            sums.meta.get("source") or source,
        )
    kind = SeveralSums if apart and nearest.endswith(apart) else Declined
    raise kind(
        f"the experts' outputs are not combined by a weighted sum per token: {nearest}", source, rank=Rank.READING
    )


def _sums_of_gates(tape: Tape, labels: Labels, nodes: list[fx.Node]) -> fx.Node | None:
    """The first of two weighted sums of several of the experts, none of which is computed of the other, and which have
    an expert in common; None where there are none.

    Args:
        nodes: what depends on an expert, in order.
    """
    out = next(iter(labels.token)).matrices[0].m
    sites = {s.node: s for s in labels.token}
    reach = {n: frozenset([n]) for n in sites}
    sums: list[fx.Node] = []
    tries = 0
    for node in nodes:
        of = frozenset().union(*(reach.get(a, frozenset()) for a in node.all_input_nodes))
        reach[node] = of | reach.get(node, frozenset())
        shape = node.meta.get("shape") or ()
        axes = _feature_axes(shape, out) if math.prod(shape) == labels.tokens * out else []
        if len(of) < 2 or not axes or tries == _MOST_SUMS or not ancestors([node]).isdisjoint(sums):
            continue
        tries += 1
        token = {sites[n]: labels.token[sites[n]] for n in of}
        some = dataclasses.replace(labels, token=token, candidate={s: labels.candidate[s] for s in token})
        entered = entry_weights(tape, some, node, axes[0])[1]  # an activation behind an expert changes what they are
        stray = (entered != 0) & (some.visits() == 0)
        if bool(entered.isfinite().all()) and not bool(stray.any()) and int((entered != 0).any(0).sum()) > 1:
            if any(not of.isdisjoint(reach[n]) for n in sums):
                return sums[0]
            sums.append(node)
    return None


def _feature_axes(shape: tuple[int, ...], out: int) -> list[int]:
    """The axes of a sum that may be its ``out`` features, the last first. A single feature needs no axis of its own: it
    then lies behind the last."""
    axes = [d for d in reversed(range(len(shape))) if shape[d] == out]
    return axes or ([len(shape)] if out == 1 else [])


def _meeting_points(sites: list[GemmSite], nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """Nodes that depend on every site, earliest first."""
    mask = {s.node: 1 << i for i, s in enumerate(sites)}
    full = (1 << len(sites)) - 1
    for node in nodes:
        reach = mask.get(node, 0)
        for a in node.all_input_nodes:
            reach |= mask.get(a, 0)
        mask[node] = reach
        dtype = node.meta.get("dtype")
        if reach == full and dtype is not None and dtype.is_floating_point:
            yield node


def _apart(tape: Tape, sites: list[GemmSite]) -> str:
    """What more there is to say of experts that do not all meet."""
    own = {s.node for s in sites}
    parts = {frozenset(own & ancestors([result])) for result in tape.results()} - {frozenset()}
    if len(parts) < 2 or frozenset(own) in parts:
        return ""
    return (
        ", but in several, each with some of the experts (several mixtures in one forward); give each mixture a module "
        "of its own"
    )


def entry_weights(
    tape: Tape, labels: Labels, target: fx.Node, axis: int, values: dict[fx.Node, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(base (T, H), weights (T, C)) of the sum ``target``: its rows without the experts, and by what each enters.

    Args:
        values: of nodes that depend on no expert, in the place of those that the tape holds.
    """
    out = next(iter(labels.token)).matrices[0].m
    live = needed(descendants(tape, [s.node for s in labels.token], target.meta["index"]), target)
    values = values or {}

    def run(codes: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        return rows_of(replay(tape, live, {**values, **codes})[target], axis)

    zero = {s.node: torch.zeros_like(tape.value(s.node)) for s in labels.token}
    base = run(zero)
    weights = torch.zeros(labels.tokens, labels.candidates, dtype=base.dtype)
    for start in range(0, labels.candidates, out):
        codes = {}
        for site, candidate in labels.candidate.items():
            hot = (candidate >= start) & (candidate < start + out) & (labels.token[site] >= 0)
            if not bool(hot.any()):
                codes[site.node] = zero[site.node]
                continue
            like = tape.value(site.node)
            rows = torch.zeros(candidate.numel(), out, dtype=like.dtype)
            rows[hot, candidate[hot] - start] = 1
            codes[site.node] = site.from_rows(rows, like)
        width = min(out, labels.candidates - start)
        found = run(codes) - base
        if bool(base.any()):
            found = _without_rounding(found, base, run({n: v * _LARGE[v.dtype] for n, v in codes.items()}))
        weights[:, start : start + width] = found[:, :width]
    return base, weights


_LARGE = {torch.float16: 2.0**8, torch.bfloat16: 2.0**20, torch.float32: 2.0**20, torch.float64: 2.0**20}


def _without_rounding(found: torch.Tensor, base: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
    """``found`` weights, which lost bits where they were added onto a larger ``base``, from codes as ``large`` as they
    may be; as they are where the code does more to large values than to multiply them."""
    better = (large - base) / _LARGE[base.dtype]
    eps = 4 * torch.finfo(base.dtype).eps
    found = torch.where((better - found).abs() <= eps * (base.abs() + found.abs()), better, found)
    whole = found.round()  # no weight at all, or a plain factor
    return torch.where((found - whole).abs() <= eps * whole.abs(), whole, found)


def _read(tape: Tape, labels: Labels, target: fx.Node, axis: int) -> Combine | str:
    base, weights = entry_weights(tape, labels, target, axis)
    visits = labels.visits()
    stray = (weights != 0) & (visits == 0)
    if bool(stray.any()):
        return f"row {int(stray.any(1).nonzero()[0])} of their sum holds an expert that did not see that token"
    total = base.double().clone()
    scale = base.double().abs()
    for site, candidate in labels.candidate.items():
        values = site.rows_out(tape.value(site.node)).double()
        keep = labels.token[site] >= 0
        token, which = labels.token[site][keep], candidate[keep]
        # a token that an expert sees twice would be counted twice: its weight is the sum of both
        part = values[keep] * (weights[token, which].double() / visits[token, which])[:, None]
        total.index_add_(0, token, part)
        scale.index_add_(0, token, part.abs())
    actual = rows_of(tape.value(target), axis).double()
    slack = 64 * max(torch.finfo(base.dtype).eps, torch.finfo(target.meta["dtype"]).eps)
    if not bool(((actual - total).abs() <= slack * scale.amax(-1, keepdim=True) + 1e-30).all()):
        return decided_by_results(tape, set(labels.candidate), target) or (
            "their sum is not linear in the experts' outputs, with one weight for each token and expert"
        )
    return Combine(target, axis, weights, base if bool(base.any()) else None)


def needed(nodes: list[fx.Node], target: fx.Node) -> list[fx.Node]:
    """Those of ``nodes`` that lead to ``target`` through one another."""
    wanted = {target}
    keep = []
    for node in reversed(nodes):
        if node in wanted:
            keep.append(node)
            wanted.update(node.all_input_nodes)
    return keep[::-1]
