"""A block's mixtures of experts, read off its probe calls: one that reaches every expert, then others."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict

import torch
from torch import nn

from moeopt.capture.call_roles import CallSpec
from moeopt.capture.collectives import refuse_collectives
from moeopt.capture.force_routing import ForceAllExperts
from moeopt.capture.op_kinds import picks_rows
from moeopt.capture.probe_inputs import aimed_at_router, probe_call
from moeopt.capture.random_ops import refuse_random
from moeopt.capture.same_graph import calls_made
from moeopt.capture.sparse_tensors import refuse_sparse
from moeopt.capture.tape import Tape, record
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.obstacles import Rank
from moeopt.passes.group_experts import GroupExperts
from moeopt.recognise.any_experts import recognize
from moeopt.recognise.experts_hit import ExpertsNotHit
from moeopt.recognise.id_bounds import IdBounds
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router import RouterReading, recognize_router, same_reading


class RowsAsked(TypedDict, total=False):
    """What is asked of the rows of a probe call."""

    aimed: torch.Tensor | None
    paired: bool


class Reader(Protocol):
    """What in a block becomes an op. Each method raises ``Declined`` where there is no such thing.

    ``kind`` tells the passes which of them is for it, see ``moeopt.rewrite.block_graph.Captured``.
    """

    kind: str

    def first(self, module: nn.Module, call_spec: CallSpec, seed: int) -> tuple[ArgsKwargs, Tape, list[Recognition]]:
        """A probe call that shows everything, its tape and its reading."""
        ...

    def again(self, tape: Tape, known: list[Recognition]) -> list[Recognition]:
        """The same on another tape of the block."""
        ...

    def routers(
        self, tapes: list[Tape], founds: list[list[Recognition]], known: list[Recognition]
    ) -> list[RouterReading]:
        """How tokens reach each of the ``known``, as tapes whose choices were not steered show it."""
        ...


class Mixture:
    """The :class:`Reader` of mixtures of experts.

    Args:
        assume: a user's hint on what each expert computes.
        given: between which values the integers of each of the block's tensor arguments lie, as its caller made them.
    """

    def __init__(self, assume: ExpertsSpec | None = None, given: Sequence[IdBounds] = ()) -> None:
        self.assume, self.given = assume, tuple(given)

    kind = GroupExperts.kind

    def first(self, module: nn.Module, call_spec: CallSpec, seed: int) -> tuple[ArgsKwargs, Tape, list[Recognition]]:
        return covering(module, call_spec, seed, self.assume)

    def again(self, tape: Tape, known: list[Recognition]) -> list[Recognition]:
        return recognize(tape, known=known, assume=self.assume)

    def routers(
        self, tapes: list[Tape], founds: list[list[Recognition]], known: list[Recognition]
    ) -> list[RouterReading]:
        readings = [[recognize_router(t, f) for f in fs] for t, fs in zip(tapes, founds, strict=True)]
        return [same_reading([r[i] for r in readings], f) for i, f in enumerate(known)]


def covering(
    module: nn.Module, call_spec: CallSpec, seed: int, assume: ExpertsSpec | None = None
) -> tuple[ArgsKwargs, Tape, list[Recognition]]:
    """A probe call that reaches every expert, with its tape and reading; more tokens each time one is missed."""
    aimed = aimed_at_router(module, call_spec)
    experts = _likely_experts(module, call_spec)
    last: ExpertsNotHit | None = None
    unread: Declined | None = None
    likely = _longest_list(module)
    kept_all: list[str] = []
    for tokens, aim, forced, flat in _ATTEMPTS:
        ids = call_spec.routed()
        wanted = _enough_tokens(tokens, forced, last, ids, experts, call_spec, likely)
        if wanted is None:
            continue
        tokens = wanted
        rows = aimed if aim and not kept_all else None  # aimed rows are those that a router is sure of
        call = probe_call(call_spec, tokens, seed, experts=experts, aimed=rows, flat=flat)
        steer = ForceAllExperts(last.num_named, seed) if forced and last is not None else None
        tape = record(module, *call, steer=steer, made=True)
        refuse_random(tape, module.training)
        refuse_collectives(tape)
        refuse_sparse(tape)
        try:
            found = recognize(tape, assume=assume)
            _refuse_other_code(tape, kept_all, unread)
            return call, tape, found
        except ExpertsNotHit as err:
            err.others = (*err.others, *(last.others if last is not None else ()))
            last = err.with_traceback(None)
            experts = max(experts, last.num_named) if ids else experts
            if steer is not None or ids:  # the ids named every expert: weights still not reached may be none
                with _causes_kept(last):
                    return call, tape, recognize(tape, idle=True, assume=assume)
        except Declined as err:
            unseen = last is None and not kept_all and keeps_all(tape)
            if last is not None:
                last.others = (*last.others, err.obstacle, *err.others)
            elif not (_left_idle(module, tape) or _picks_one_row(tape) or unseen):
                raise
            elif unread is None:  # of experts that no token chose nothing is on the tape, not even that they are missed
                unread = err.with_traceback(None)
            kept_all = kept_all or (calls_made(tape) if unseen else [])
    failed = last or unread
    assert failed is not None
    try:
        raise failed
    finally:
        del last, unread, failed


def _refuse_other_code(tape: Tape, before: list[str], unread: Declined | None) -> None:
    """Raise ``unread``, why a call of fewer tokens was not read, where this one made other calls of PyTorch than that,
    ``before``: a branch on the number of tokens is another computation."""
    if before and unread is not None and calls_made(tape) != before:
        raise unread


def _enough_tokens(
    tokens: int, forced: bool, last: ExpertsNotHit | None, ids: list[int], experts: int, call_spec: CallSpec,
    likely: int,
) -> int | None:  # fmt: skip
    """How many tokens an attempt takes, ``tokens`` or more; None where there is nothing to steer."""
    if last is None and not forced and not ids:
        # chance does not reach every one of many experts: the next attempt steers
        tokens = 8 if likely > 128 else max(tokens, 2 * likely)
    if forced:
        if last is None or not last.num_named:
            return None
        tokens = max(tokens, min(2 * last.num_named, 4096))
    if ids and experts:
        tokens = max(tokens, 2 * math.ceil(experts / call_spec.slots(ids[0])))
    return tokens


@contextlib.contextmanager
def _causes_kept(missed: ExpertsNotHit) -> Iterator[None]:
    """Another reading of the same call may fail; what it names as a cause is kept with ``missed``."""
    try:
        yield
    except Declined as err:
        missed.others = (*missed.others, *(o for o in (err.obstacle, *err.others) if o.rank >= Rank.FOUND))


def _left_idle(module: nn.Module, tape: Tape) -> bool:
    """Whether the module has a list of which some children ran and others did not."""
    ran = {call.module for call in tape.calls}
    lists = [m for m in module.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    return any(0 < sum(child in ran for child in one.children()) < len(one) for one in lists)


def _picks_one_row(tape: Tape) -> bool:
    """Whether some expert was given one row, whose dimension is then not told from others of one element."""
    picked = (n for n in tape.nodes if picks_rows(n) and (n.meta.get("shape") or (0,))[0] == 1)
    return any(len(n.meta["shape"]) > 1 and n.all_input_nodes[0].meta["shape"][0] > 1 for n in picked)


def keeps_all(tape: Tape) -> bool:
    """Whether a mask by which rows are picked is set for each of them, so that what it leaves out is not to be seen."""
    masks = (n for n in tape.nodes if n.meta.get("dtype") == torch.bool and n.meta["shape"] and n.op != "get_attr")
    return any(any(map(picks_rows, n.users)) and bool(tape.value(n).all()) for n in masks)


def _longest_list(module: nn.Module) -> int:
    """How many experts there may be: the length of the longest list of modules or stack of matrices."""
    lists = (len(m) for m in module.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict)))
    return max([0, *lists, *(p.shape[0] for p in module.parameters() if p.dim() == 3)])


_ATTEMPTS = (
    # tokens, aimed at router rows, choices steered, many short sequences
    (48, False, False, False),
    (48, False, True, False),
    (256, True, False, False),
    (256, True, False, True),
    (1536, True, False, False),
)


_MORE = (4, 16)
"""Times as many tokens for a call that must reach every expert, since the code around the experts is kept."""


def later_probes(aimed: torch.Tensor | None, function: bool) -> Iterator[tuple[int, RowsAsked]]:
    """Times as many tokens as a call of known experts begins with, and what more is asked of its rows.

    Of an expert that is any ``function`` of a row, one that is given a single row may be read otherwise: rows are
    paired.
    """
    yield 1, {}
    if aimed is not None:
        yield 1, {"aimed": aimed}
    for times in (1, *_MORE) if function else _MORE:
        yield times, {"aimed": None, "paired": function}


def _likely_experts(module: nn.Module, call_spec: CallSpec) -> int:
    """How many experts ids given as arguments may name: the number of stacked weights or of alike children."""
    if choices := call_spec.indices("choices"):
        return call_spec.rows(choices[0]).shape[-1]
    ids = [call_spec.rows(n) for n in call_spec.indices("ids")]
    if not ids or not ids[0].numel():
        return 0
    least = int(ids[0].max()) + 1
    sizes = [p.shape[0] for p in module.parameters() if p.dim() >= 3]
    sizes += [len(m) for m in module.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))]
    return min((s for s in sizes if s >= max(least, 2)), default=least)
