"""The attempt on one block: its modules are tried from the innermost outwards until one can be rewritten."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from moeopt.capture.tape import Call
from moeopt.capture.tree import ArgsKwargs
from moeopt.capture.user_modes import active_user_mode
from moeopt.errors import Declined
from moeopt.find.block_candidates import BlockCandidate
from moeopt.ir.row_function import RowFunction
from moeopt.obstacles import Rank
from moeopt.options import Options
from moeopt.passes.group_experts import GroupExperts
from moeopt.passes.manager import PassManager
from moeopt.pipeline.alike_blocks import AlikeBlocks
from moeopt.pipeline.block import Rewrite, Runtime, rewrite_block
from moeopt.pipeline.block_capture import original_forward
from moeopt.pipeline.block_reports import Attempt, PipelineResult, expert_parameters
from moeopt.pipeline.coverage import Mixture
from moeopt.pipeline.declined_calls import DeclinedCalls
from moeopt.pipeline.finished_blocks import note
from moeopt.pipeline.obstacles_met import ObstaclesMet
from moeopt.pipeline.other_values import refuse_other_values
from moeopt.pipeline.pays import TAKEN, WouldNotPay
from moeopt.recognise.hints import hint_for
from moeopt.recognise.id_bounds import argument_bounds, takes_open_integers
from moeopt.recognise.recognition import Recognition
from moeopt.rewrite.install import install
from moeopt.rewrite.scratch import UNSET, read_outside

_OTHERS = (
    "the experts that were read in this module are those of another mixture, and these were not read beside them; give "
    "them, with what routes to them, a module of their own"
)
LEVELS = 4
"""How far up from the innermost module a block is looked for: the router and the sum may be outside it."""


class BlockAttempts:
    """Attempts on the blocks of ``model``; a rewrite that succeeds is installed and written into ``outcome``.

    Args:
        call: the example call of the model.
        changed: why a module's call is not what its caller gave it, by path; such a module is declined.
        places: all that will be attempted; what their modules are called with.
    """

    def __init__(
        self,
        model: nn.Module,
        call: ArgsKwargs,
        outcome: PipelineResult,
        changed: dict[str, str],
        options: Options,
        runtime: Runtime | None,
        manager: PassManager,
        places: Sequence[BlockCandidate] = (),
    ) -> None:
        self.model, self.call, self.outcome, self.changed = model, call, outcome, changed
        self.called: dict[str, list[Call]] = {}
        for level in (level for place in places for level in levels_of(place)):
            self.called.setdefault(level.path, []).append(level)
        self.options, self.runtime, self.manager = options, runtime, manager
        self.alike = _alike_blocks(options)
        self._declined = DeclinedCalls(outcome.rewrites)

    def attempt(self, place: BlockCandidate) -> Attempt:
        """What became of the block at ``place``."""
        if place.reason:
            return Attempt(path=place.call.path, reason=place.reason, where=place.source)
        met, read = ObstaclesMet(place), set[int]()
        spent = 0.0
        for level in levels_of(place):
            done = self.outcome.rewrites.get(level.path)
            if done is not None:
                if expert_parameters(self.model, level.path, done.found) & place.weights:
                    return self._again(place, level, done)
                unmatched_reason = next((f.unmatched_reason for f in done.found if f.unmatched_reason), "")
                if unmatched_reason:
                    met.add(level.path, Declined(unmatched_reason, rank=Rank.READING))
                continue
            if reason := self._no_more():
                return Attempt(reason=reason, path=level.path)
            started = time.perf_counter()
            try:
                rewrite = self._rewrite(place, level, met.caused_inside(level.path))
            except WouldNotPay as err:
                spent += time.perf_counter() - started
                here = _read_at(self.model, place, level.path, err.found) if place.weights else err.found
                if not here:  # this module holds another block, which would not pay
                    met.add(level.path, Declined(err.reason, err.where, rank=Rank.PROBE))
                    continue
                found, where = expert_parameters(self.model, level.path, here), err.where or place.source
                count = len(here[0].experts)
                return Attempt(None, level.path, _unpaid(place, err), where, spent, found, met.others(), count)
            except Declined as err:
                functions = [f for f in getattr(err, "found", []) if _is_function(f)]
                if functions:  # the experts were read: their obstacle decides, and their parts get no entries
                    err.rank = Rank.FORBIDS
                    read |= expert_parameters(self.model, level.path, functions)
                met.add(level.path, err)
                spent += time.perf_counter() - started
                if functions and place.weights and place.weights <= read:  # this place is a piece of these experts
                    count, where = len(functions[0].experts), err.where or place.source
                    return Attempt(None, level.path, err.reason, where, spent, read, met.others(), count)
                continue
            self.manager.stands(rewrite.passes)
            self.outcome.rewrites[level.path] = rewrite
            self.outcome.checks.append(rewrite.check)
            note(rewrite.check)
            return Attempt(rewrite, level.path, seconds=rewrite.seconds)
        if place.unread:
            return Attempt(None, place.call.path, place.unread, place.source, spent, read)
        obstacle = met.decide()
        if obstacle is None:
            return Attempt(reason="no module around it could be probed", path=place.call.path, seconds=spent)
        own = place.own_levels()
        home = obstacle.module if obstacle.module in own or not own else own[-1]
        return Attempt(None, home, obstacle.reason, obstacle.where, spent, read, met.others())

    def _again(self, place: BlockCandidate, level: Call, done: Rewrite) -> Attempt:
        """What became of another call of a block that is rewritten."""
        module = self.model.get_submodule(level.path)
        try:
            refuse_other_values(module, self.outcome.calls[level.path], [level])
        except Declined as err:
            return Attempt(None, level.path, err.reason, place.source)
        return Attempt(done, level.path)

    def _no_more(self) -> str:
        """Why no further block is rewritten; "" where one may be."""
        if left_out := self.manager.leaves_out(GroupExperts.name):
            return f"{left_out}; without {GroupExperts.name} no other pass applies"
        return f"MOEOPT_FUEL={self.manager.fuel}: no more blocks are rewritten" if self.manager.exhausted else ""

    def _rewrite(self, place: BlockCandidate, level: Call, caused_inside: bool) -> Rewrite:
        """The rewrite of the module called at ``level``, verified and installed; ``Declined`` where there is none."""
        path = level.path
        name, module = path or type(self.model).__name__, self.model.get_submodule(path)
        reader = Mixture(hint_for(self.options.hints, name, module, place.weights), argument_bounds(level))
        if path in self.changed:
            raise Declined(self.changed[path])
        if level.autocast:
            if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
                raise Declined(
                    "moeopt.optimize is called inside a torch.autocast of your own, and rewritten code is verified for "
                    "dtypes that it names; call optimize outside of that block, and convert the model with .to(dtype) "
                    "instead of autocast: under autocast the original code runs"
                )
            raise Declined(
                "the model calls it under autocast, which decides dtypes at each call that the rewritten code must "
                "name; convert the model with .to(dtype) instead, or begin autocast in the block's own forward"
            )
        if level.mode:
            around = "moeopt.optimize is called" if active_user_mode() else "the model calls it"
            raise Declined(
                f"{around} under {level.mode}, a mode of PyTorch that sees or changes every op, and rewritten code "
                "makes other ops; leave the mode, or begin it in the block's own forward: it runs the original code"
            )
        if self.runtime is not None:  # one graph has all of the model's calls
            refuse_other_values(module, self.outcome.calls[path], self.called.get(path, ()))
        known = None if reader.assume is not None or takes_open_integers(level) else self.alike
        hinted = reader.assume is not None
        with contextlib.nullcontext() if hinted else self._declined.remembered(level, caused_inside):
            rewrite = rewrite_block(
                name, module, self.outcome.calls[path], self.options, self.runtime, reader, self.manager, known
            )
        if not expert_parameters(self.model, path, rewrite.found) & place.weights:
            raise Declined(_OTHERS, rank=Rank.READING)
        _refuse_outside_readers(self.model, self.call, path, rewrite)
        install(module, rewrite.program)
        return rewrite


def _unpaid(place: BlockCandidate, err: WouldNotPay) -> str:
    """Why a block stays that was read: what is known of its kind, or what the reading says."""
    return f"{place.unread}; {TAKEN}" if place.unread else err.reason


def levels_of(place: BlockCandidate) -> Iterator[Call]:
    """The calls around a block that are tried, innermost first, one for each module."""
    seen: set[str] = set()
    for level in place.levels:
        if level.path not in seen and not level.path.startswith("<"):
            seen.add(level.path)
            yield level
        if len(seen) == LEVELS:
            return


def part_of_another(model: nn.Module, place: BlockCandidate, attempts: list[tuple[BlockCandidate, Attempt]]) -> bool:
    """Whether ``place`` is a piece of experts that were read whole at another one (an adapter, a second layer), or of a
    mixture that was declined as a whole there (projections into and out of an attention)."""
    for other, done in attempts:
        if place.mixture is not None and place.mixture == other.mixture == done.path and done.rewrite is None:
            return True
        home = next((level for level in other.levels if level.path == done.path), None)
        if home is None or not any(level is home for level in place.levels) or not place.weights:
            continue
        rewritten = [] if done.rewrite is None else _read_at(model, other, done.path, done.rewrite.found)
        functions = [f for f in rewritten if _is_function(f)]
        if place.weights <= (done.read | expert_parameters(model, done.path, functions)):
            return True
    return False


def _read_at(model: nn.Module, place: BlockCandidate, path: str, found: Sequence[Recognition]) -> list[Recognition]:
    """Those of the mixtures ``found`` in the module at ``path`` that have weights of ``place``: others stand beside."""
    return [f for f in found if expert_parameters(model, path, [f]) & place.weights]


def _is_function(recognition: Recognition) -> bool:
    return isinstance(recognition.spec, RowFunction)


def _refuse_outside_readers(model: nn.Module, call: ArgsKwargs, path: str, rewrite: Rewrite) -> None:
    keys = [key for key, value in rewrite.program.block.attributes.items() if value is UNSET]
    if keys and path and read_outside(model, call, path, keys):
        names = ", ".join(".".join(filter(None, key)) for key in keys)
        raise Declined(
            f"its forward stores Python values ({names}) that code outside reads, and a graph computes tensors only; "
            "store a tensor, or return the value"
        )


def _alike_blocks(options: Options) -> AlikeBlocks | None:
    """Where kinds of blocks are remembered; None where a block is not verified, or each pass on it is asked for."""
    told = options.verify == "off" or options.dump is not None or options.fuel is not None
    return None if told else AlikeBlocks(original_forward)
