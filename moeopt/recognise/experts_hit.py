"""Whether every expert of a block was hit by the probe call: Parameters like the experts' own that nothing used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.weight_refs import ExpertRef, MatrixRef, VectorRef, tensor_at
from moeopt.listed import listed
from moeopt.obstacles import Rank, Stage
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.ffn_groups import source_of
from moeopt.recognise.gemm_sites import GemmSite, find_sites


class ExpertsNotHit(Declined):
    """Some experts were never chosen on this probe call: try another before deciding.

    ``num_named`` is how many experts there seem to be.
    """

    rank = Rank.PROBE
    stage = Stage.EXPERTS
    num_named = 0


def check_all_hit(tape: Tape, experts: list[ExpertRef], group: list[FFNCandidate]) -> None:
    """Raise ``ExpertsNotHit`` if Parameters that are like the experts' own were not used by any of them.

    One that multiplied rows elsewhere is something else than an idle expert.
    """
    sites = find_sites(tape)
    active = {m.path for s in sites if s.matrix.numel() for m in s.matrices}
    own = {s.node for c in group for s in (*c.ins, *c.outs)}
    named = {**dict(tape.root.named_parameters(remove_duplicate=False)), **dict(tape.root.named_buffers())}
    others = [s for s in sites if s.node not in own]
    for refs in ([e.w_in[0] for e in experts], [e.w_out for e in experts]):
        missing = _idle_parameters(tape, refs, named, active)
        for path in {r.path for r in refs}:
            missing += _idle_parts(path, tensor_at(tape.root, path), refs, experts, others)
        if missing:
            family = siblings({r.path for r in refs}, named)  # a shared expert of their shape is none of them
            raise _not_hit(missing, sum(r.path in family for r in refs) or len(refs), group)


def _idle_parameters(
    tape: Tape, refs: list[MatrixRef], named: Mapping[str, torch.Tensor], active: set[str]
) -> list[str]:
    """Names of Parameters like those of ``refs``, a matrix of each expert, that multiplied no rows."""
    used = {r.path for r in refs}
    names = set() if len(used) == 1 and len(refs) > 1 else siblings(used, named)
    held = {id(tensor_at(tape.root, p)) for p in used}
    shapes = {tensor_at(tape.root, p).shape for p in used}
    return sorted(
        name
        for name in names
        if id(named[name]) not in held and _like(named[name].shape, shapes, len(used)) and name not in active
    )


def _idle_parts(
    path: str, whole: torch.Tensor, refs: list[MatrixRef], experts: list[ExpertRef], others: list[GemmSite]
) -> list[str]:
    """A name for each further expert that the Parameter ``path`` holds: entries of a stack, or the rest of a matrix."""
    held = [r for e in experts for r in (*e.w_in, e.w_out) if r.path == path]  # gate and up may be parts of one stack
    if whole.dim() > 2 and all(r.dk[0] == r.dm[0] == 0 for r in refs):
        here = {r.origin[0] for r in held}
        if len(here) < whole.shape[0]:
            return [f"{path}[{i}]" for i in range(whole.shape[0]) if i not in here]
        if (idle := _idle_behind(path, whole, held)) is not None:
            return idle
    return _rest_of(path, whole, experts, others)


def _idle_behind(path: str, whole: torch.Tensor, held: list[MatrixRef]) -> list[str] | None:
    """The same where experts are counted by a further axis of the stack, behind one of gate and up, say; of an axis
    of which one entry is read, as of the layers of a model, the others belong to someone else. None where no other axis
    counts matrices."""
    lead = [a for a in range(1, whole.dim()) if all(r.dk[a] == r.dm[a] == 0 for r in held)]
    used = {a: {r.origin[a] for r in held} for a in lead}
    counting = [a for a in lead if len(used[a]) > 1]
    if not counting:
        return None
    return [f"{path}[{', '.join([':'] * a)}, {i}]" for a in counting for i in range(whole.shape[a]) if i not in used[a]]


def _not_hit(missing: list[str], hit: int, group: list[FFNCandidate]) -> ExpertsNotHit:
    some = listed(dict.fromkeys(missing))
    error = ExpertsNotHit(
        f"no probe token reached the expert weights {some}, so what they compute could not be checked; "
        "pass example inputs that reach every expert",
        source_of(group[0]),
    )
    error.num_named = hit + len(missing)
    return error


def _like(shape: torch.Size, shapes: set[torch.Size], known: int) -> bool:
    """Whether a Parameter of ``shape`` may be another expert's; of several experts each may have neurons of its own."""
    if shape in shapes or known < 2:
        return shape in shapes
    return any(len(shape) == len(s) and sum(a != b for a, b in zip(shape, s, strict=True)) == 1 for s in shapes)


def _rest_of(path: str, whole: torch.Tensor, experts: list[ExpertRef], others: list[GemmSite]) -> list[str]:
    """A name for each expert that fits into those numbers of ``whole`` which neither experts nor ``others`` read."""
    read: dict[MatrixRef | VectorRef, int] = {}
    shares, holders = 0, 0
    for expert in experts:
        here = [r for r in (*expert.w_in, *expert.b_in, expert.w_out, expert.b_out) if r is not None and r.path == path]
        own = {r: r.m * (r.k if isinstance(r, MatrixRef) else 1) for r in here}
        shares, holders = shares + sum(own.values()), holders + bool(own)
        read |= own
    each = shares // holders
    for site in others:
        used = [site.matrices[i] for i in site.matrix.unique().tolist() if i >= 0]
        read |= {r: r.k * r.m for r in used if r.path == path}
    held = sum(read.values())
    return [f"{path} beyond {held:,} of its {whole.numel():,} numbers"] * ((whole.numel() - held) // each)


def universe_of(tape: Tape, experts: list[ExpertRef]) -> int:
    """How many experts the module's names count, those that share Parameters with another included."""
    named = dict(tape.root.named_parameters(remove_duplicate=False))
    used = {e.w_in[0].path for e in experts}
    return len(siblings(used, named)) if len(used) > 1 else len(experts)


def siblings(used: set[str], named: Mapping[str, torch.Tensor]) -> set[str]:
    """Names that differ from a used one in just the number that the used ones differ in (or any, for one)."""
    patterns: dict[Any, list[str]] = {}
    for path in used:
        parts = path.split(".")
        for i, part in enumerate(parts):
            if re.search(r"\d", part):
                patterns.setdefault((i, tuple(parts[:i]), re.sub(r"\d+", "#", part), tuple(parts[i + 1 :])), []).append(
                    path
                )
    if not patterns:
        return set()
    (i, head, middle, tail), members = max(patterns.items(), key=lambda p: (len(p[1]), p[0][0]))
    del members
    return {
        name
        for name in named
        if len(parts := name.split(".")) == len(head) + 1 + len(tail)
        and tuple(parts[:i]) == head
        and re.sub(r"\d+", "#", parts[i]) == middle
        and tuple(parts[i + 1 :]) == tail
    }
