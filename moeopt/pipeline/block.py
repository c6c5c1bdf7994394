"""One block, from a real call to a verified program: record, recognise, run the passes, verify."""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from moeopt.capture.call_roles import CallSpec
from moeopt.capture.probe_inputs import probe_call
from moeopt.capture.tree import ArgsKwargs
from moeopt.control_flow.tensor_properties import property_decides
from moeopt.errors import CaptureError, Declined, UsageError
from moeopt.ir.specs import RouterSpec
from moeopt.obstacles import Obstacle, Rank
from moeopt.options import Options
from moeopt.passes.manager import PassManager, Result
from moeopt.passes.quantize_experts import QuantizeExperts
from moeopt.pipeline.alike_blocks import AlikeBlocks, Bound, Known, bound_result
from moeopt.pipeline.block_capture import Capture, original_forward, statistics_kept
from moeopt.pipeline.call_readings import call_readings, may_hold_ids
from moeopt.pipeline.chosen_passes import pass_manager
from moeopt.pipeline.coverage import Mixture, Reader
from moeopt.pipeline.few_tokens_check import check_few_tokens
from moeopt.pipeline.finished_blocks import recall
from moeopt.pipeline.pays import check_pays
from moeopt.pipeline.registered_hooks import changing_hook_reason, needs_own_hooks, without_own_hooks
from moeopt.pipeline.size_limits import SizeCases, max_tokens
from moeopt.pipeline.size_sweep import check_sizes
from moeopt.recognise.experts_hit import ExpertsNotHit
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router import RouterReading
from moeopt.rewrite.block_graph import BlockGraph
from moeopt.rewrite.equal_rows import equal_rows_reason
from moeopt.rewrite.install import BlockProgram, RewrittenForward
from moeopt.rewrite.legality import check_module, non_finite_reason
from moeopt.rewrite.live_codes import dequantized
from moeopt.rewrite.silent_refusals import silent_refusals
from moeopt.value_types import PyObject
from moeopt.verification.block import verify_block
from moeopt.verification.cases import adversarial_cases
from moeopt.verification.results import BlockCheck, Case
from moeopt.verification.size_cases import COLUMNS


class Runtime(Protocol):
    """What will run the rewritten blocks in the end, when it is not PyTorch."""

    def run_through_backend(self, routers: Mapping[int, RouterSpec]) -> contextlib.AbstractContextManager[None]:
        """While open, rewritten blocks compute as that runtime will; ``routers`` by the id of the bank they feed."""
        ...

    def demote(self, reason: str) -> bool:
        """Give up the form that ran last, which failed for ``reason``; False when there was none."""
        ...


@dataclass
class Rewrite:
    """A verified (or, with verify="off", unverified) rewrite of one module."""

    program: BlockProgram
    found: list[Recognition]
    check: BlockCheck
    routers: list[RouterReading]
    seconds: float
    passes: Result


def rewrite_block(
    name: str,
    module: nn.Module,
    call: ArgsKwargs,
    options: Options,
    runtime: Runtime | None = None,
    reader: Reader | None = None,
    manager: PassManager | None = None,
    alike: AlikeBlocks | None = None,
) -> Rewrite:
    """Rewrite ``module`` as ``call`` uses it, without changing it; verify it as ``runtime`` computes it.

    Args:
        reader: what in the block becomes an op; None means its mixtures of experts.
        manager: what runs the passes; None means one of the block's own, as ``options`` ask for.
        alike: blocks whose graph may be bound to this one, and which remembers this one.

    Raises:
        Declined: with the reason; nothing was changed.
    """
    try:
        manager = manager or pass_manager(options, runtime)
        check_module(module)
        if needed := needs_own_hooks(module, call):
            raise Declined(needed, rank=Rank.FORBIDS)
        with silent_refusals(module), without_own_hooks(module):
            bound = None if alike is None else _rebind(name, module, call, options, runtime, alike, manager)
            return bound or _rewrite(name, module, call, options, runtime, reader or Mixture(), manager, alike)
    except Declined as err:
        reason = ""
        if err.rank < Rank.FORBIDS:
            reason = (
                non_finite_reason(module, not isinstance(err, ExpertsNotHit))
                or equal_rows_reason(module)
                or changing_hook_reason(module, call)
            )
        if reason:
            raise Declined(reason, rank=Rank.FORBIDS, others=(err.obstacle, *err.others)) from None
        raise
    except UsageError:
        raise
    except Exception as err:
        where = traceback.extract_tb(err.__traceback__)[-1]
        raise Declined(
            f"moeopt itself failed on it ({type(err).__name__}: {str(err)[:200]} in {where.name}); the block is left "
            "as it was; please report this with the block's code",
            rank=Rank.INTERNAL,
        ) from err


def _rewrite(
    name: str,
    module: nn.Module,
    call: ArgsKwargs,
    options: Options,
    runtime: Runtime | None,
    reader: Reader,
    manager: PassManager,
    alike: AlikeBlocks | None,
) -> Rewrite:
    started = time.perf_counter()
    last: Declined | None = None
    met: list[Obstacle] = []
    for call_spec in call_readings(call):
        try:
            capture = Capture(name, module, call_spec, options, reader)
            if runtime is None:  # an engine always takes row functions: without them the block has no graph
                check_pays(capture.found)
            judge = functools.partial(_verify, capture, call, options, runtime)
            result = manager.run(capture.block(), judge, capture.differ)
        except CaptureError as err:  # the block does not run on arguments read in this way: try the next reading
            met.append(err.obstacle)
            last = last if last is not None and not isinstance(last, CaptureError) else err.with_traceback(None)
            continue
        except ExpertsNotHit as err:  # an argument that was taken for a mask may hold ids
            if not call_spec.indices("choices") and not call_spec.flip_masks:
                raise
            met += [err.obstacle, *err.others]
            last = err.with_traceback(None)
            continue
        except Declined as err:
            if call_spec.flip_masks or may_hold_ids(call_spec, err):
                met += [err.obstacle, *err.others]
                last = last if call_spec.flip_masks else last or err.with_traceback(None)
                continue
            err.others = (*met, *err.others)
            raise
        check: BlockCheck = result.verdict  # type: ignore[assignment]
        if check.passed is False and call_spec.flip_masks:
            continue
        if check.passed is False:
            raise _reverted(capture, check)
        if capture.neutral:
            raise Declined(capture.neutral)
        program = capture.program(result.block)
        _check_python(capture, program, call, options)
        result.block.root = None  # a program is bound to a module when it is installed
        if alike is not None:
            alike.add(Known(module, call_spec, program, capture.found, capture.routers, result))
        return Rewrite(program, capture.found, check, capture.routers, time.perf_counter() - started, result)
    last = last or Declined("its arguments could not be read as rows of tokens", rank=Rank.PROBE)
    last.others = tuple(met)
    try:
        raise last
    finally:
        del last


def _check_python(capture: Capture, program: BlockProgram, call: ArgsKwargs, options: Options) -> None:
    """``Declined`` for Python of the block's that decides by values, sizes or other questions what no graph holds."""
    own = OwnForward(capture.module)
    capture.check_branches(program.guard.most)
    if (failed := check_few_tokens(capture, program, own, options)) is not None:
        raise _reverted(capture, failed, capture.branches.line)
    if (failed := check_sizes(capture, program, own, options)) is not None:
        raise _reverted(capture, failed)
    if asked := property_decides(capture.module, own, call, program.reads):
        raise Declined(asked)


def _reverted(capture: Capture, check: BlockCheck, line: str | None = None) -> Declined:
    lies = check.reason.startswith(f"case {COLUMNS!r}")
    asks = "; does its code ask how its input lies (stride, is_contiguous)? Call x.contiguous() first" if lies else ""
    error = Declined(capture.unreached or f"it was rewritten, verified and reverted: {check.reason}{asks}", line)
    error.found = capture.found  # type: ignore[attr-defined]
    return error


def _rebind(
    name: str, module: nn.Module, call: ArgsKwargs, options: Options, runtime: Runtime | None, alike: AlikeBlocks,
    manager: PassManager,
) -> Rewrite | None:  # fmt: skip
    """The graph of an alike block that was verified before, bound to ``module`` and verified there; None where there
    is none, or where it is not equivalent here."""
    started = time.perf_counter()
    bound = alike.propose(name, module, list(call_readings(call)))
    if bound is None:
        return None

    def verify(block: BlockGraph) -> BlockCheck:
        return recall(name) or _verify(bound, call, options, runtime, block, False)

    asked = [one for one in manager.passes if isinstance(one, QuantizeExperts) and not manager.leaves_out(one.name)]
    done = bound_result(bound, verify, asked[0] if asked else None)
    if done is None:
        return None
    program, result = done
    check: BlockCheck = result.verdict  # type: ignore[assignment]
    known = bound.known
    return Rewrite(program, known.found, check, known.routers, time.perf_counter() - started, result)


def _verify(
    capture: Capture | Bound,
    call: ArgsKwargs,
    options: Options,
    runtime: Runtime | None,
    block: BlockGraph,
    settle: bool,
) -> BlockCheck:
    """The verdict on ``block``; with ``settle``, ``runtime`` gives up the lowerings with which it fails."""
    name, module, call_spec, found = capture.name, capture.module, capture.call_spec, capture.found
    program = capture.program(block)
    original = capture.branches.watched(OwnForward(module), module)
    rewritten = RewrittenForward(module, program, original_forward(module))
    rewritten.silent = True  # a case that it refuses is told in the verdict
    experts = max(len(f.experts) for f in found)
    rows = [call_spec.rows(n) for n in call_spec.indices("tokens")]
    aimed = None
    if rows and rows[0].dim() == 2 and not call_spec.routed():
        covering = probe_call(call_spec, 48, options.seed + 7)
        aimed = CallSpec(covering[0], covering[1], call_spec.leaves).rows(call_spec.indices("tokens")[0])
    most = max_tokens(module, found)
    cases = adversarial_cases(
        call_spec, experts, level=options.verify, seed=options.seed, router_rows=aimed, max_tokens=most,
        half=any(p.dtype == torch.float16 for p in module.parameters()),
    )  # fmt: skip
    if options.verify != "off":
        chosen = max(f.routing.per_token or len(f.experts) for f in found)
        sizes = SizeCases(module, call_spec, experts, chosen, program, most, options)
        at = next((n for n, case in enumerate(cases) if case.name == "many tokens"), len(cases))
        cases[at:at] = sizes.cases  # of two cases that fail, the one that names the number is told
        cases.append(Case("the given inputs", *call))
    routed = zip(rewritten.banks, program.routers, strict=True)
    known = {id(bank): router for (bank, _), router in routed if router is not None}
    while True:
        with (
            runtime.run_through_backend(known) if runtime is not None else contextlib.nullcontext(),
            statistics_kept(module),
            dequantized(module, [bank for bank, _ in rewritten.banks]),  # the quantised model's own code is the judge
        ):
            check = verify_block(name, original, rewritten, cases, options.verify, features=found[-1].features)
            refused = rewritten.fallbacks
            if check.passed:  # an engine refuses empty calls
                sizes.bound(original, rewritten, empty=runtime is None)
        if check.passed is not False or runtime is None or not settle or not runtime.demote(check.reason):
            break
    if refused and check.passed:
        check.passed, check.reason = False, f"the rewritten code refused a verification case: {rewritten.last_refusal}"
    return check


class OwnForward:
    """The block's own forward, also when a rewritten one is installed on the instance."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        return original_forward(self.module)(*args, **kwargs)
