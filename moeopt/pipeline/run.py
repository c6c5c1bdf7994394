"""THE order: what happens to a model, top to bottom.

discover        places that may hold experts or a dense FFN         (find/discover)
for each place, innermost module first:
    probe       traces of the block                         (capture/tape, capture/probe_inputs)
    recognise   rows, function, combine, routing                   (recognise/experts)
    passes      one op where the experts' sum stood; what follows   (passes/pipeline, passes/manager)
    verify      against a float64 oracle on adversarial routing     (verification/block)
    install     the block runs the graph                            (rewrite/install)
for each dense FFN, where asked for: the same, split or fused       (passes/split_dense_ffn, fuse_dense)
verify the model end to end                                         (verification/model)
"""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import Declined, UsageError
from moeopt.find.block_candidates import BlockCandidate
from moeopt.find.discover import discover
from moeopt.find.module_lists import feed_forward_lists
from moeopt.ir.row_function import RowFunction
from moeopt.obstacles import Rank
from moeopt.options import Options
from moeopt.passes.base import PassRecord
from moeopt.passes.group_experts import GroupExperts
from moeopt.passes.manager import PassManager
from moeopt.patches import fewer_collections
from moeopt.pipeline.alike_blocks import AlikeBlocks
from moeopt.pipeline.block import Rewrite, Runtime, pass_manager, rewrite_block
from moeopt.pipeline.block_capture import original_forward
from moeopt.pipeline.block_reports import Attempt, PipelineResult, expert_parameters, report_of_block, shared_blocks
from moeopt.pipeline.coverage import Mixture
from moeopt.pipeline.dense import DenseResult as DenseResult
from moeopt.pipeline.dense import check_groups, rewrite_all
from moeopt.pipeline.dump import Dump
from moeopt.pipeline.obstacles_met import ObstaclesMet
from moeopt.pipeline.pays import WouldNotPay
from moeopt.pipeline.real_calls import real_calls
from moeopt.recognise.hints import hint_for
from moeopt.recognise.id_bounds import argument_bounds, takes_open_integers
from moeopt.recognise.recognition import Recognition
from moeopt.report import BlockReport
from moeopt.rewrite.install import install
from moeopt.rewrite.legality import absent_reason
from moeopt.rewrite.scratch import UNSET, read_outside

LEVELS = 4
"""How far up from the innermost module a block is looked for: the router and the sum may be outside it."""


@fewer_collections()
def run(model: nn.Module, call: ArgsKwargs, options: Options, runtime: Runtime | None = None) -> PipelineResult:
    """Rewrite every block of ``model`` that can be, in place, and say what became of each.

    Raises:
        CaptureError: the model does not run on the example inputs.
        UsageError: a hint that matches no block, a pass that is none.
    """
    started = time.perf_counter()
    manager = pass_manager(options, runtime)
    say = options.say
    say("looking for feed-forward and mixture-of-experts blocks")
    dump = Dump(options.dump) if options.dump is not None else None
    absent = absent_reason(model)
    if absent:
        return PipelineResult(list(_without_values(model, absent)), [], {}, {}, time.perf_counter() - started)
    places = discover(model, *call)
    moe = [p for p in places if p.kind == "moe"]
    dense = [p for p in places if p.kind == "dense_ffn" and not p.reason]
    if options.dense == "split":
        check_groups([*dense, *(a for p in moe for a in p.alone)], options)
    wanted = {c.path for p in moe for c in p.levels[:LEVELS]}
    calls, changed = real_calls(model, call, wanted | {p.call.path for q in places for p in (q, *q.alone)})
    for place in (q for p in places for q in (p, *p.alone) if q.kind == "dense_ffn"):
        place.reason = place.reason or changed.get(place.call.path, "")
    outcome = PipelineResult([], [], {}, calls)
    attempts: list[tuple[BlockCandidate, Attempt]] = []
    alike = _alike_blocks(options)
    for number, place in enumerate(moe):
        if _part_of_another(model, place, attempts):
            continue
        say(f"block {number + 1} of {len(moe)}: {place.call.path or type(model).__name__}")
        attempts.append((place, _attempt(model, call, place, outcome, changed, options, runtime, manager, alike)))
        _note_passes(attempts[-1][1], model, outcome, options)
        if dump is not None:
            done = attempts[-1][1]
            path = done.path or next((level.path for level in _levels(place)), "")
            name, block = path or type(model).__name__, model.get_submodule(path)
            dump.block(name, block, calls.get(path), done.rewrite, done.reason, done.others)
    tried = {c.path or type(model).__name__ for p in moe for c in _levels(p)}
    unused = [p for p in options.hints if p and not any(fnmatch.fnmatch(path, p) for path in tried)]
    if unused:
        raise UsageError(
            f"hints[{unused[0]!r}] matches no block; the places that were looked at are "
            f"{', '.join(sorted(repr(path) for path in tried)) or 'none'}"
        )
    places = sorted([*places, *shared_blocks(model, attempts)], key=lambda p: p.order)
    dense = [p for p in places if p.kind == "dense_ffn" and not p.reason]
    denses: dict[int, DenseResult] = {}
    if options.dense != "leave":
        found = rewrite_all(model, dense, calls, options, runtime, outcome.rewrites, say, manager)
        for one in {s.path: s for s in found}.values():
            _keep(outcome, one.records, options)
            if dump is not None and one.rewrite is not None:
                name, home = one.path or type(model).__name__, model.get_submodule(one.path)
                dump.block(name, home, calls.get(one.path), one.rewrite, one.reason)
        denses = {id(p): s for p, s in zip(dense, found, strict=True)}
        outcome.checks += list({s.path: s.rewrite.check for s in found if s.rewrite is not None}.values())
    read = {id(p) for p, _ in attempts}
    places = [p for p in places if p.kind != "moe" or id(p) in read]
    outcome.blocks = list(report_of_block(model, places, attempts, denses, outcome, options.seed))
    outcome.seconds = time.perf_counter() - started
    return outcome


def _without_values(model: nn.Module, reason: str) -> Iterator[BlockReport]:
    """A declined entry for each module that holds experts, by structure alone: a meta model cannot run."""
    for path, module in model.named_modules():
        stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if len(stacked) >= 2 or feed_forward_lists(module):
            yield BlockReport(
                path or type(model).__name__, "moe", "declined", reason,
                stacked[0].shape[0] if len(stacked) >= 2 else len(feed_forward_lists(module)),
            )  # fmt: skip


def _attempt(
    model: nn.Module,
    call: ArgsKwargs,
    place: BlockCandidate,
    outcome: PipelineResult,
    changed: dict[str, str],
    options: Options,
    runtime: Runtime | None,
    manager: PassManager,
    alike: AlikeBlocks | None,
) -> Attempt:
    if place.reason:
        return Attempt(path=place.call.path, reason=place.reason, where=place.source)
    met, read = ObstaclesMet(place), set[int]()
    spent = 0.0
    left_out = manager.leaves_out(GroupExperts.name)
    for level in _levels(place):
        done = outcome.rewrites.get(level.path)
        if done is not None:
            if expert_parameters(model, level.path, done.found) & place.weights:
                return Attempt(done, level.path)
            unmatched_reason = next((f.unmatched_reason for f in done.found if f.unmatched_reason), "")
            if unmatched_reason:
                met.add(level.path, Declined(unmatched_reason, rank=Rank.READING))
            continue
        if left_out:
            return Attempt(reason=f"{left_out}; without {GroupExperts.name} no other pass applies", path=level.path)
        if manager.exhausted:
            return Attempt(reason=f"MOEOPT_FUEL={manager.fuel}: no more blocks are rewritten", path=level.path)
        started = time.perf_counter()
        module = model.get_submodule(level.path)
        try:
            name = level.path or type(model).__name__
            reader = Mixture(hint_for(options.hints, name), argument_bounds(level))
            if level.path in changed:
                raise Declined(changed[level.path])
            known = None if reader.assume is not None or takes_open_integers(level) else alike
            module_call = outcome.calls[level.path]
            rewrite = rewrite_block(name, module, module_call, options, runtime, reader, manager, known)
            if not expert_parameters(model, level.path, rewrite.found) & place.weights:
                raise Declined("other experts of this module were recognised, these were not", rank=Rank.READING)
            _refuse_outside_readers(model, call, level.path, rewrite)
            install(module, rewrite.program)
        except WouldNotPay as err:
            spent += time.perf_counter() - started
            return Attempt(None, level.path, err.reason, err.where or place.source, seconds=spent,
                            read=expert_parameters(model, level.path, err.found), others=met.others())  # fmt: skip
        except Declined as err:
            functions = [f for f in getattr(err, "found", []) if _is_function(f)]
            if (
                functions
            ):  # the experts were read whole: what stands in their way decides, and the pieces are not listed
                err.rank = Rank.FORBIDS
                read |= expert_parameters(model, level.path, functions)
            met.add(level.path, err)
            spent += time.perf_counter() - started
            continue
        manager.stands(rewrite.passes)
        outcome.rewrites[level.path] = rewrite
        outcome.checks.append(rewrite.check)
        return Attempt(rewrite, level.path, seconds=rewrite.seconds)
    found = met.decide()
    if found is None:
        return Attempt(reason="no module around it could be probed", path=place.call.path, seconds=spent)
    return Attempt(None, found.module, found.reason, found.where, spent, read, met.others())


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


def _part_of_another(model: nn.Module, place: BlockCandidate, attempts: list[tuple[BlockCandidate, Attempt]]) -> bool:
    """Whether ``place`` is a piece of experts that were read whole at another one (an adapter, a second layer)."""
    for other, done in attempts:
        home = next((level for level in other.levels if level.path == done.path), None)
        if home is None or not any(level is home for level in place.levels) or not place.weights:
            continue
        functions = [] if done.rewrite is None else [f for f in done.rewrite.found if _is_function(f)]
        if place.weights <= (done.read | expert_parameters(model, done.path, functions)):
            return True
    return False


def _is_function(recognition: Recognition) -> bool:
    return isinstance(recognition.spec, RowFunction)


def _note_passes(attempt: Attempt, model: nn.Module, outcome: PipelineResult, options: Options) -> None:
    """Write down what the passes did at one place; of a declined block, why the first of them made no graph."""
    name = attempt.path or type(model).__name__
    if attempt.rewrite is None:
        declined = PassRecord(
            GroupExperts.name, GroupExperts.level, name, 0, attempt.reason, attempt.seconds,
        )  # fmt: skip
        _keep(outcome, [declined], options)
    elif not any(r.block == name for r in outcome.passes):  # a block that holds several places is noted once
        _keep(outcome, attempt.rewrite.passes.records, options)


def _keep(outcome: PipelineResult, records: Sequence[PassRecord], options: Options) -> None:
    outcome.passes += records
    if options.print_passes:
        for record in records:
            print(f"moeopt: {record}", file=sys.stderr, flush=True)


def _levels(place: BlockCandidate) -> Iterator[Any]:
    seen: set[str] = set()
    for level in place.levels:
        if level.path not in seen and not level.path.startswith("<"):
            seen.add(level.path)
            yield level
        if len(seen) == LEVELS:
            return
