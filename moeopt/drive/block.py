"""One block, from a real call to a verified program: record, recognise, run the passes, verify."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from moeopt.compare.block import BlockCheck, Case, verify_block
from moeopt.compare.cases import adversarial_cases
from moeopt.compare.prototype import Prototype
from moeopt.drive.mixture import Call, Mixture, Reader
from moeopt.drive.obstacles import check_experts, check_module, frozen_values, neutral_reason, random_reason
from moeopt.drive.witness import prototypes, witness
from moeopt.errors import CaptureError, Declined, UsageError
from moeopt.ir.alike import same_computation
from moeopt.ir.quiet import undone
from moeopt.ir.specs import RouterSpec
from moeopt.ir.tape import Tape, clone_inputs, record
from moeopt.ir.tree import tree_leaves
from moeopt.options import Options
from moeopt.passes.manager import PassManager, Result, check_names
from moeopt.passes.pipeline import PIPELINE
from moeopt.passes.recognize_experts import Recognition, Uncovered
from moeopt.passes.recognize_router import RouterReading
from moeopt.passes.replace_experts import replacement
from moeopt.rewrite.block_graph import BlockGraph, Captured, ExpertWeights
from moeopt.rewrite.generalize import generalize
from moeopt.rewrite.plan import Plan, make_plan
from moeopt.rewrite.program import OPAQUE, TENSOR, Guard, Program, RewrittenForward, bind

MOST_FLOPS = 4e10
"""Of one run of a block in its largest verification case."""


class Runtime(Protocol):
    """What will run the rewritten blocks in the end, when it is not PyTorch."""

    def answering(self, routers: Mapping[int, RouterSpec]) -> contextlib.AbstractContextManager[None]:
        """While open, rewritten blocks compute as that runtime will; ``routers`` by the id of the bank they feed."""
        ...

    def demote(self, reason: str) -> bool:
        """Give up the form that ran last, which failed for ``reason``; False when there was none."""
        ...


@dataclass
class Rewrite:
    """A verified (or, with verify="off", unverified) rewrite of one module."""

    program: Program
    found: list[Recognition]
    check: BlockCheck
    routers: list[RouterReading]
    seconds: float
    passes: Result


def rewrite_block(
    name: str,
    module: nn.Module,
    call: Call,
    options: Options,
    runtime: Runtime | None = None,
    reader: Reader | None = None,
    manager: PassManager | None = None,
) -> Rewrite:
    """Rewrite ``module`` as ``call`` uses it, without changing it; verify it as ``runtime`` computes it.

    Args:
        reader: what in the block becomes an op; None means its mixtures of experts.
        manager: what runs the passes; None means one of the block's own, as ``options`` ask for.

    Raises:
        Declined: with the reason; nothing was changed.
    """
    try:
        manager = manager or pass_manager(options, runtime)
        return _rewrite(name, module, call, options, runtime, reader or Mixture(), manager)
    except (Declined, UsageError):
        raise
    except Exception as err:
        where = traceback.extract_tb(err.__traceback__)[-1]
        raise Declined(
            f"moeopt itself failed on it ({type(err).__name__}: {str(err)[:200]} in {where.name}); the block is left "
            "as it was; please report this with the block's code"
        ) from err


def pass_manager(options: Options, runtime: Runtime | None) -> PassManager:
    """The manager that ``options`` ask for.

    Raises:
        UsageError: they name a pass that is not there.
    """
    passes = PIPELINE if options.passes is None else options.passes
    check_names(options.skip_passes, (*passes, *PIPELINE), "skip_passes")
    here = {one.name for one in passes}
    return PassManager(
        passes,
        [name for name in options.skip_passes if name in here],  # MOEOPT_SKIP_PASSES holds for every run
        options.only_passes,
        options.fuel,
        runtime is not None,
        options.dump is not None,
    )


def _rewrite(
    name: str,
    module: nn.Module,
    call: Call,
    options: Options,
    runtime: Runtime | None,
    reader: Reader,
    manager: PassManager,
) -> Rewrite:
    started = time.perf_counter()
    check_module(module)
    last: Declined | None = None
    for proto in _versions(call):
        try:
            capture = _Capture(name, module, proto, options, reader)
            judge = functools.partial(_verify, capture, call, options, runtime)
            result = manager.run(capture.block(), judge, capture.differ)
        except CaptureError as err:  # this reading of the arguments' axes does not run: try the next
            last = last if last is not None and not isinstance(last, CaptureError) else err.with_traceback(None)
            continue
        except Uncovered as err:  # what was read as a mask may be ids
            if not proto.indices("choices") and not proto.turned:
                raise
            last = err.with_traceback(None)
            continue
        except Declined:
            if proto.turned:
                continue
            raise
        check: BlockCheck = result.verdict  # type: ignore[assignment]
        if check.passed is False:
            if proto.turned:
                continue
            raise Declined(f"it was rewritten, verified and reverted: {check.reason}")
        if capture.neutral:
            raise Declined(capture.neutral)
        result.block.root = None  # a program is bound to a module when it is installed
        program = Program(result.block, capture.signature)
        return Rewrite(program, capture.found, check, capture.routers, time.perf_counter() - started, result)
    try:
        raise last or Declined("its arguments could not be read as rows of tokens")
    finally:
        del last


def _versions(call: Call) -> Iterator[Prototype]:
    """Readings of the call; those with marks that are all alike first with both values in them: what a mask of ones
    does shows only where it is not one. As they are they come second, for code that takes no other values."""
    for proto in prototypes(*call):
        if proto.alike_marks():
            yield dataclasses.replace(proto, turned=True)
        yield proto


class _Capture:
    """What one block does in three calls of different sizes, and what was read from them; recorded once.

    Attributes:
        found: what becomes an op, as the first call showed it.
        neutral: the Parameter that a rewrite would miss, in a sentence; "" if there is none.
        routers: how tokens reach each of the ``found``, once a pass has asked for the guard.
    """

    def __init__(self, name: str, module: nn.Module, proto: Prototype, options: Options, reader: Reader) -> None:
        self.name, self.module, self.proto, self.reader = name, module, proto, reader
        call, tape, self.found = reader.first(module, proto, options.seed)
        self.tapes, self.founds, self.calls = [tape], [self.found], [call]
        for tokens, seed in ((14, 1), (20, 2)):
            call = witness(proto, tokens, options.seed + seed, experts=len(self.found[0].experts), variant=seed)
            again = self.tapes[0].attributes and seed == 2
            self.tapes.append(_later_call(module, call) if again else record(module, *call))
            self.founds.append(reader.again(self.tapes[-1], self.found))
            self.calls.append(call)
        for tape, found_there in zip(self.tapes, self.founds, strict=True):
            _same_experts(self.found, found_there)
            if reason := random_reason(tape, module.training):
                raise Declined(reason)
        check_experts(module, self.tapes[0], self.found)
        self.plans = [_plan(t, f) for t, f in zip(self.tapes, self.founds, strict=True)]
        self.neutral = neutral_reason(module, self.tapes[0], self.found, self.plans[0])
        self.frozen = frozen_values(module, self.tapes[0], self.found, self.plans[0])
        self.signature = inspect.signature(_original(module))
        self.bounds = [bind(self.signature, *c) for c in self.calls]
        self.shapes = [[tuple(t.shape) for t in _tensors(c)] for c in self.calls]
        self.routers: list[RouterReading] = []
        _stateless(self.tapes[0], self.plans, self.shapes)

    def block(self) -> BlockGraph:
        """The block's own code, for the passes."""
        weights = [ExpertWeights(f.experts, f.spec) for f in self.found]
        captured = Captured(
            self.reader.kind, self.tapes[0], self.plans, self.shapes, weights, self.frozen, self._finish
        )
        return BlockGraph(self.name, captured=captured, root=self.module)

    def _finish(self) -> tuple[Guard, list[RouterSpec | None]]:
        bound = self.bounds[0]
        _check_order(self.calls[0], bound.tensors())
        both = _same_in_other_mode(
            self.module, self.calls[1], self.tapes[1], self.plans[1], self.founds[0], self.reader
        )
        guard = Guard(
            [_template(leaf) for leaf in tree_leaves(list(bound.values))],
            _fixed([[tuple(t.shape) for t in b.tensors()] for b in self.bounds]),
            [t.dtype for t in bound.tensors()],
            None if both else self.module.training,
            False,
        )
        self.routers = self.reader.routers(self.tapes[1:], self.founds[1:], self.founds[0])
        self.tapes, self.plans, self.founds = [], [], []  # the values of three calls are no longer needed
        return guard, [r.spec for r in self.routers]

    def differ(self, before: BlockGraph, after: BlockGraph) -> str:
        """How two graphs of the block differ in bits on one of the recorded calls; "" where they do not."""
        if before.captured is not None:
            return ""
        results = []
        for block in (before, after):
            with _statistics_kept(self.module), torch.no_grad():
                args, kwargs = clone_inputs(self.calls[1])
                forward = RewrittenForward(self.module, Program(block, self.signature), _original(self.module))
                with undone(self.module) as watched, watched:
                    results.append(_tensors((args, {"result": forward(*args, **kwargs)})))
        for number, (a, b) in enumerate(zip(*results, strict=True)):
            if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num()):
                return f"tensor {number} of its results has other bits on a call with {len(a)} rows"
        return ""


def _stateless(tape: Tape, plans: list[Plan], shapes: list[list[tuple[int, ...]]]) -> None:
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
                f"({names}); pass that state as an argument"
            ) from err


def _later_call(module: nn.Module, call: Call) -> Tape:
    """The tape of a second call, after a first one has stored its attributes: they must not matter."""
    with undone(module) as watched:
        with watched:
            args, kwargs = clone_inputs(call)
            module(*args, **kwargs)
        return record(module, *call)


def _original(module: nn.Module) -> Callable[..., Any]:
    inner = module.__dict__.get("_old_forward") or module.__dict__.get("forward")
    return inner if inner is not None else type(module).forward.__get__(module)


def _plan(tape: Tape, found: list[Recognition]) -> Plan:
    return make_plan(tape, [replacement(f, i) for i, f in enumerate(found)])


def _same_experts(first: list[Recognition], other: list[Recognition]) -> None:
    if len(first) != len(other) or any(
        a.experts != b.experts or a.spec != b.spec for a, b in zip(first, other, strict=False)
    ):
        raise Declined(
            "two probes with different tokens read its experts differently; its dispatch depends on the data"
        )


def _same_in_other_mode(
    module: nn.Module, call: Call, here: Tape, plan: Plan, found: list[Recognition], reader: Reader
) -> bool:
    """Whether training and evaluation mode compute the same, judged by a trace in the other mode."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        module.train(not module.training)
        light = record(module, *call, keep_values=False)
        if light.random_nodes():
            return False
        if same_computation(here, light):
            return True
        tape = record(module, *call)
        other = _plan(tape, reader.again(tape, found))
        generalize([plan, other], [[tuple(t.shape) for t in _tensors(call)]] * 2)
        return True
    except Declined:
        return False
    finally:
        for m, flag in flags:
            m.training = flag


def _tensors(call: Call) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(list(call)) if isinstance(leaf, torch.Tensor)]


def _check_order(call: Call, ordered: list[torch.Tensor]) -> None:
    """Input steps were recorded in call order; the program takes tensors in signature order."""
    at = {id(t): i for i, t in enumerate(ordered)}
    if [at[id(t)] for t in _tensors(call)] != list(range(len(ordered))):
        raise Declined("its tensor arguments are passed in another order than its signature names them")


def _template(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return TENSOR
    return leaf if isinstance(leaf, (int, float, str, bool, type(None), torch.dtype, torch.device)) else OPAQUE


def _fixed(shapes: list[list[tuple[int, ...]]]) -> list[tuple[int | None, ...]]:
    """Each input's sizes, None where they varied between the witnesses."""
    return [
        tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*versions, strict=True))
        for versions in zip(*shapes, strict=True)
    ]


def _verify(
    capture: _Capture, call: Call, options: Options, runtime: Runtime | None, block: BlockGraph, settle: bool
) -> BlockCheck:
    name, module, proto, found = capture.name, capture.module, capture.proto, capture.found
    program = Program(block, capture.signature)
    original = _Original(module)
    rewritten = RewrittenForward(module, program, _original(module))
    experts = max(len(f.experts) for f in found)
    rows = [proto.rows(n) for n in proto.indices("tokens")]
    aimed = None
    if rows and rows[0].dim() == 2 and not proto.routed():
        covering = witness(proto, 48, options.seed + 7)
        aimed = Prototype(covering[0], covering[1], proto.leaves).rows(proto.indices("tokens")[0])
    most = _affordable(module, found)
    cases = adversarial_cases(proto, experts, level=options.verify, seed=options.seed, router_rows=aimed, most=most)
    if options.verify != "off":
        cases.append(Case("the given inputs", *call))
    routed = zip(rewritten.banks, program.routers, strict=True)
    known = {id(bank): router for (bank, _), router in routed if router is not None}
    while True:
        with runtime.answering(known) if runtime is not None else contextlib.nullcontext(), _statistics_kept(module):
            check = verify_block(name, original, rewritten, cases, level=options.verify)
        if check.passed is not False or runtime is None or not settle or not runtime.demote(check.reason):
            break
    if rewritten.fallbacks and check.passed:
        check.passed, check.reason = False, f"the rewritten code refused a verification case: {rewritten.last_refusal}"
    return check


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
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


def _affordable(module: nn.Module, found: list[Recognition]) -> int:
    """Tokens that the largest case may have: their products should not take more than a second or a few."""
    share = max(min(1.0, (f.frontier.per_token or len(f.experts)) / len(f.experts)) for f in found)
    return int(MOST_FLOPS / max(1.0, 2 * share * sum(p.numel() for p in module.parameters())))


class _Original:
    """The block's own forward, also when a rewritten one is installed on the instance."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _original(self.module)(*args, **kwargs)
