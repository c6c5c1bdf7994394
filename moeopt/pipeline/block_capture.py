"""What one block does in three calls of different sizes, and what was read from them: all that the passes need."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.call_roles import CallSpec
from moeopt.capture.isolated_run import undone
from moeopt.capture.probe_inputs import aimed_at_router, probe_call
from moeopt.capture.random_ops import refuse_random
from moeopt.capture.same_graph import one_computation
from moeopt.capture.tape import Tape, clone_inputs, record
from moeopt.capture.tree import ArgsKwargs, tree_leaves
from moeopt.control_flow.routing_branches import RoutingBranches
from moeopt.control_flow.untaken_branches import DispatchFacts
from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import RouterSpec
from moeopt.obstacles import Rank
from moeopt.options import Options
from moeopt.passes.group_experts import GroupExperts
from moeopt.pipeline.call_guards import check_order, guard_of, tensors_of
from moeopt.pipeline.coverage import Reader, keeps_all, later_probes
from moeopt.pipeline.id_probe import id_ranges
from moeopt.pipeline.probe_plans import (
    UNLIKE,
    plan_of,
    read_alike,
    refuse_other_experts,
    same_in_other_mode,
    skipped_by_few,
    why_other,
)
from moeopt.recognise.id_bounds import IdBounds, kept_by_caller
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router import RouterReading
from moeopt.recognise.routing_by_sum import NO_ONE_TENSOR, ONE_TENSOR
from moeopt.rewrite.block_graph import BlockGraph, Captured, ExpertWeightRefs
from moeopt.rewrite.id_range import IdRange
from moeopt.rewrite.install import BlockProgram, CallGuard, RewrittenForward, bind
from moeopt.rewrite.kept_effects import written_in
from moeopt.rewrite.kept_steps import KeptSteps
from moeopt.rewrite.legality import check_experts, frozen_values, neutral_reason, unreached_reason
from moeopt.rewrite.reads import Reads, observe
from moeopt.rewrite.scratch import UNSET, scratch_attributes
from moeopt.rewrite.symbolic_shapes import generalize
from moeopt.verification.oracle import Restored

_SHOWS_MORE = (192, 1536)
"""Tokens of the first of three calls that are read where those of fewer tokens were not read alike."""
_ALIKE = ((1, 16), (2, 16), (5, 8), (14, 4), (48, 4))
"""Tokens, and how many calls of so many, to see what depends on values: one token has few experts."""
_NOT_ALL = (
    f"{NO_ONE_TENSOR}, so the code that dispatches to every expert is kept, and {{tokens}} tokens did not reach all of "
    f"them with two rows; {ONE_TENSOR}"
)


class Capture:
    """What one block does in three calls of different sizes, and what was read from them; recorded once.

    Attributes:
        found: what becomes an op, as the first call showed it.
        unreached: the expert that no token reached, in a sentence; "" if there is none.
        neutral: the same, or the Parameter that a rewrite would miss, in a sentence; "" if there is none.
        branches: what its Python reads of the routing.
        routers: how tokens reach each of the ``found``, once a pass has asked for the guard.
    """

    def __init__(self, name: str, module: nn.Module, call_spec: CallSpec, options: Options, reader: Reader) -> None:
        self.name, self.module, self.call_spec, self.reader = name, module, call_spec, reader
        call, tape, self.found = reader.first(module, call_spec, options.seed)
        self.tapes, self.founds, self.calls = [tape], [self.found], [call]
        if any(f.routing.missing for f in self.found):
            self.tapes, self.founds, self.calls = [], [], []
            self.found = self._watch(48, options.seed, 0)
        with skipped_by_few(self.founds):
            for tokens, variant in ((14, 1), (20, 2)):
                self._watch(tokens, options.seed + variant, variant)
        self._read_all(options)
        _stateless(self.tapes[0], self.plans, self.shapes)

    def _read_all(self, options: Options) -> None:
        """Read the calls together; where they were not read alike, or may not tell, calls of more tokens."""
        try:
            self._read(options)
        except UNLIKE as err:
            if not err.may_tell or not any(self._read_more_tokens(tokens, options) for tokens in _SHOWS_MORE):
                raise why_other(err, self.founds) from None
            return
        if not read_alike(self.plans) or all(map(keeps_all, self.tapes)):
            sizes = _SHOWS_MORE[:1] if read_alike(self.plans) else _SHOWS_MORE
            any(self._read_more_tokens(tokens, options) for tokens in sizes)

    def _read_more_tokens(self, tokens: int, options: Options) -> bool:
        """Read three calls of ``tokens`` or more: in few of them, what leaves rows out may leave out none. Whether they
        were read alike; else what was read before stays.

        All six must be one computation: a branch on the number of tokens is another one.
        """
        before, few = dict(self.__dict__), self.tapes
        try:
            self.tapes, self.founds, self.calls = [], [], []
            for variant in range(3):
                found = self._watch(tokens + 6 * variant, options.seed + variant, variant)
                self.found = found if variant == 0 else self.found
            self._read(options)
            shown = read_alike(self.plans) and not all(map(keeps_all, self.tapes))
            alike = shown and one_computation(few, self.tapes)
        except Declined:
            alike = False
        if not alike:
            self.__dict__.update(before)
        return alike

    def _read(self, options: Options) -> None:
        """Everything that the recorded calls show together."""
        module, reader, call_spec = self.module, self.reader, self.call_spec
        for tape, found_there in zip(self.tapes, self.founds, strict=True):
            refuse_other_experts(self.found, found_there)
            refuse_random(tape, module.training)
        check_experts(module, self.tapes[0], self.found)
        self.branches = RoutingBranches(self.tapes[0])
        self.id_ranges = [IdRange() for _ in self.found]
        self.kept: tuple[IdBounds, ...] = ()
        if reader.kind == GroupExperts.kind:
            given = getattr(reader, "given", ())
            self.id_ranges = id_ranges(module, self.calls, self.tapes, self.founds, given)
            self.kept = kept_by_caller(self.tapes[0], self.found, given)
        other = probe_call(call_spec, 14, options.seed + 3, experts=len(self.found[0].experts), variant=1)
        self.scratch = scratch_attributes(module, self.calls[1], self.tapes[1], other)
        self.plans = [plan_of(t, f, self.id_ranges, self.scratch) for t, f in zip(self.tapes, self.founds, strict=True)]
        for plan in self.plans:  # a call that stores an equal value shows no change on the tape
            plan.attributes = {**plan.attributes, **{k: UNSET for k in self.plans[1].attributes if k in self.scratch}}
        self.unreached = unreached_reason(module, self.tapes[0], self.found, self.plans[0], call_spec.integers())
        self.neutral = self.unreached or neutral_reason(module, self.tapes[0], self.found, self.plans[0])
        self.frozen = frozen_values(module, self.tapes[0], self.found, self.plans[0])
        self.signature = inspect.signature(original_forward(module))
        self.bounds = [bind(self.signature, *c) for c in self.calls]
        self.shapes = [[tuple(t.shape) for t in tensors_of(c)] for c in self.calls]
        self.routers: list[RouterReading] = []
        self._reads: dict[Any, Reads] = {}
        self._written = written_in(self.tapes)
        self._assigned = sorted({place for t in self.tapes for place in (*t.attributes, *t.in_place)})

    def _watch(self, tokens: int, seed: int, variant: int) -> list[Recognition]:
        """Record another call; with rows aimed at the router where those at random reach too few experts to be read."""
        later = variant == 2 and bool(self.tapes[0].attributes)
        function, experts = isinstance(self.found[0].spec, RowFunction), len(self.found[0].experts)
        for times, more in later_probes(aimed_at_router(self.module, self.call_spec), function):
            call = probe_call(self.call_spec, times * tokens, seed, experts=experts, variant=variant, **more)
            tape = _later_call(self.module, call) if later else record(self.module, *call, made=True)
            try:
                found = self.reader.again(tape, self.found)
            except Declined as err:
                if more and not function:
                    raise
                unread = err.with_traceback(None)  # the one row of an expert may look like several of a part
                continue
            if not any(f.routing.missing for f in found):
                self.tapes.append(tape)
                self.founds.append(found)
                self.calls.append(call)
                return found
            unread = Declined(_NOT_ALL.format(tokens=times * tokens), found[0].source or None)
        raise unread

    def block(self) -> BlockGraph:
        """The block's own code, for the passes."""
        weights = [ExpertWeightRefs(f.experts, f.spec) for f in self.found]
        per_token = [f.routing.per_token for f in self.found]
        captured = Captured(
            self.reader.kind, self.tapes[0], self.plans, self.shapes, weights, self.frozen, per_token, self._finish
        )
        return BlockGraph(self.name, captured=captured, root=self.module)

    def program(self, block: BlockGraph) -> BlockProgram:
        """``block`` as it is installed, with what the block's code read outside its modules."""
        kept = tuple(block.kept_modules)
        live = (p for p in self._assigned if any(p[0] == k or p[0].startswith(f"{k}.") for k in kept))
        written = (*block.attributes, *live)
        key = (*kept, *written)
        if key not in self._reads:
            with undone(self.module) as watched:  # after all runs: what one of them writes, the next one must show
                runs = [functools.partial(_run_under, watched, self.module, self.calls[i]) for i in (0, 2, 1)]
                self._reads[key] = observe(self.module, block.kept_modules, written, runs)
        return BlockProgram(block, self.signature, reads=self._reads[key], written=self._written)

    def _finish(self) -> tuple[CallGuard, list[RouterSpec | None]]:
        check_order(self.calls[0], self.bounds[0].tensors())
        both = same_in_other_mode(
            self.module, self.calls[1], self.tapes[1], self.plans[1], self.founds[0], self.reader, self.id_ranges,
            self.scratch,
        )  # fmt: skip
        guard = guard_of(self.bounds, None if both else self.module.training, self.kept)
        self.routers = self.reader.routers(self.tapes[1:], self.founds[1:], self.founds[0])
        self.tapes, self.plans, self.founds = [], [], []  # the values of three calls are no longer needed
        return guard, [r.spec for r in self.routers]

    def check_branches(self, most: int | None) -> None:
        """``Declined`` for a branch of its Python that no call took; ``most``: tokens for which the rewrite holds."""

        def run(mode: TorchDispatchMode) -> None:
            with undone(self.module) as watched, mode:
                _run_under(watched, self.module, self.calls[1])

        run_restored = Restored(self.module)

        def watched_run(call: ArgsKwargs, watch: Callable[..., Any]) -> None:
            watch(run_restored, *call)

        per_token = [(f.routing.per_token, len(f.experts)) for f in self.found]
        every = any(k is None or k >= experts for k, experts in per_token)
        self.branches.check(run, every)
        experts = max(experts for _, experts in per_token)
        alike = [[call] for call in self.calls] + [self._alike_calls(*one, experts) for one in _ALIKE]
        groups = [[functools.partial(watched_run, call) for call in calls] for calls in alike]
        self.branches.check_tests(groups, DispatchFacts(experts, every, most))

    def _alike_calls(self, tokens: int, count: int, experts: int) -> list[ArgsKwargs]:
        """Calls of equal shapes and other values."""
        return [probe_call(self.call_spec, tokens, 101 + i, experts=experts, variant=1) for i in range(count)]

    def differ(self, before: BlockGraph, after: BlockGraph) -> str:
        """How two graphs of the block differ in bits on one of the recorded calls; "" where they do not."""
        if before.captured is not None:
            return ""
        results = []
        for block in (before, after):
            with statistics_kept(self.module), torch.no_grad():
                args, kwargs = clone_inputs(self.calls[1])
                forward = RewrittenForward(self.module, self.program(block), original_forward(self.module))
                with undone(self.module) as watched, watched:
                    results.append(tensors_of((args, {"result": forward(*args, **kwargs)})))
        for number, (a, b) in enumerate(zip(*results, strict=True)):
            if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()):
                return f"tensor {number} of its results has other bits on a call with {len(a)} rows"
        return ""


def _stateless(tape: Tape, plans: list[KeptSteps], shapes: list[list[tuple[int, ...]]]) -> None:
    """The last plan is that of a second call: attributes that the first one stored must not have changed it."""
    if tape.attributes:
        for key, value in plans[0].attributes.items():  # self.dtype = x.dtype: a second call finds it there already
            if all(isinstance(v, torch.dtype) for v in tree_leaves(value)):
                plans[-1].attributes.setdefault(key, value)
        generalize(plans[:-1], shapes[:-1])
        try:
            generalize(plans, shapes)
        except Declined as err:
            names = ", ".join(".".join(filter(None, key)) for key in tape.attributes)
            raise Declined(
                f"it behaves differently on a second call, because its forward reads what an earlier call stored "
                f"({names}); pass that state as an argument",
                rank=Rank.FORBIDS,
            ) from err


def _run_under(watched: TorchDispatchMode, module: nn.Module, call: ArgsKwargs) -> None:
    args, kwargs = clone_inputs(call)
    with watched:  # without hooks of the block itself: they stay with it, and are no code of its forward
        original_forward(module)(*args, **kwargs)


def _later_call(module: nn.Module, call: ArgsKwargs) -> Tape:
    """The tape of a second call, after a first one has stored its attributes: they must not matter."""
    with undone(module) as watched:
        with watched:
            args, kwargs = clone_inputs(call)
            module(*args, **kwargs)
        return record(module, *call, made=True)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    inner = module.__dict__.get("_old_forward") or module.__dict__.get("forward")
    bound: Callable[..., Any] = inner if inner is not None else type(module).forward.__get__(module)
    return bound


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """In training mode a batch norm writes its running statistics, and verification cases hold NaN and infinity."""
    training = any(child.training for child in module.modules())
    small = [b for b in module.buffers() if training and b.numel() <= 1 << 16 and not b.is_inference()]
    before = [buffer.clone() for buffer in small]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(small, before, strict=True):
                buffer.copy_(value)
