"""THE order: what happens to a model, top to bottom.

discover        places that may hold experts or a dense FFN         (find/discover)
compare         with the quantised checkpoint that was loaded, if any   (pipeline/beside_checkpoint)
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
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.control_flow.size_uses import parsed_once
from moeopt.errors import UsageError
from moeopt.find.block_candidates import BlockCandidate
from moeopt.find.discover import discover
from moeopt.find.module_lists import feed_forward_lists
from moeopt.find.packed_weights import packed_weights
from moeopt.listed import listed
from moeopt.options import Options
from moeopt.passes.base import PassRecord
from moeopt.passes.group_experts import GroupExperts
from moeopt.passes.manager import PassManager
from moeopt.passes.quantize_experts import BankRows
from moeopt.patches import fewer_collections
from moeopt.pipeline.attempts import LEVELS, BlockAttempts, levels_of, part_of_another
from moeopt.pipeline.beside_checkpoint import beside_checkpoint
from moeopt.pipeline.block import Runtime
from moeopt.pipeline.block_reports import Attempt, PipelineResult, report_of_block, shared_blocks
from moeopt.pipeline.chosen_passes import pass_manager
from moeopt.pipeline.dense import DenseResult as DenseResult
from moeopt.pipeline.dense import check_groups, rewrite_all
from moeopt.pipeline.dump import Dump
from moeopt.pipeline.real_calls import real_calls
from moeopt.report import BlockReport
from moeopt.rewrite.legality import absent_reason


@fewer_collections()
@parsed_once()
def run(
    model: nn.Module,
    call: ArgsKwargs,
    options: Options,
    runtime: Runtime | None = None,
    rows: BankRows | None = None,
    known: Collection[int] = (),
) -> PipelineResult:
    """Rewrite every block of ``model`` that can be, in place, and say what became of each.

    ``rows``: of the experts on the user's calibration data (``quantization/calibration``). ``known``: identities of
    weights; blocks that read one of them are left out.

    Raises:
        CaptureError: the model does not run on the example inputs.
        UsageError: a hint that matches no block, a pass that is none.
    """
    started = time.perf_counter()
    manager = pass_manager(options, runtime, model, rows)
    options.say("looking for feed-forward and mixture-of-experts blocks")
    dump = Dump(options.dump) if options.dump is not None else None
    absent = absent_reason(model)
    if absent:
        return PipelineResult(list(_without_values(model, absent)), [], {}, {}, time.perf_counter() - started)
    places = [p for p in discover(model, *call) if p.weights.isdisjoint(known)]
    beside = beside_checkpoint(model, [q for p in places for q in (p, *p.alone)])
    moe = [p for p in places if p.kind == "moe"]
    if options.dense == "split":
        check_groups([*_dense(places), *(a for p in moe for a in p.alone)], options)
    calls, changed = _calls_of(model, call, places)
    told = [note for note in (packed_weights(model), _nothing_given(call)) if note]
    outcome = PipelineResult([], [], {}, calls, notes=[*beside, *told])
    blocks = BlockAttempts(model, call, outcome, changed, options, runtime, manager, moe)
    attempts = _rewrite_blocks(blocks, moe, dump)
    _check_hints(model, moe, options)
    experts = {weight for place, _ in attempts for weight in place.weights}
    places = [p for p in places if p.kind == "moe" or experts.isdisjoint(p.weights)]  # one that looked like a dense FFN
    places = sorted([*places, *shared_blocks(model, attempts)], key=lambda p: p.order)
    denses: dict[int, DenseResult] = {}
    if options.dense != "leave":
        denses = _rewrite_dense(model, _dense(places), outcome, options, runtime, manager, dump)
    read = {id(p) for p, _ in attempts}
    places = [p for p in places if p.kind != "moe" or id(p) in read]
    outcome.blocks = list(report_of_block(model, places, attempts, denses, outcome, options.seed))
    outcome.seconds = time.perf_counter() - started
    return outcome


def _nothing_given(call: ArgsKwargs) -> str:
    """A note where no tensor of the example call has a value; "" where one has, or it has no tensors."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    if not tensors or any(tensor.numel() for tensor in tensors):
        return ""
    shapes = listed(tuple(tensor.shape) for tensor in tensors)
    return (
        f"the example inputs hold no values ({shapes}): no token ran through the model, so blocks may not have been "
        "seen, and nothing was compared: give at least one"
    )


def _dense(places: list[BlockCandidate]) -> list[BlockCandidate]:
    return [p for p in places if p.kind == "dense_ffn" and not p.reason]


def _calls_of(
    model: nn.Module, call: ArgsKwargs, places: list[BlockCandidate]
) -> tuple[dict[str, ArgsKwargs], dict[str, str]]:
    """The call of each module that may be rewritten, and why some cannot; dense FFNs among these get that reason."""
    wanted = {c.path for p in places if p.kind == "moe" for c in p.levels[:LEVELS]}
    every = [q for p in places for q in (p, *p.alone)]
    calls, changed = real_calls(model, call, wanted | {p.call.path for p in every})
    for place in every:
        if place.kind == "dense_ffn":
            place.reason = place.reason or changed.get(place.call.path, "")
    return calls, changed


def _rewrite_blocks(
    blocks: BlockAttempts, moe: list[BlockCandidate], dump: Dump | None
) -> list[tuple[BlockCandidate, Attempt]]:
    model, outcome, options = blocks.model, blocks.outcome, blocks.options
    attempts: list[tuple[BlockCandidate, Attempt]] = []
    for number, place in enumerate(moe):
        if part_of_another(model, place, attempts):
            continue
        options.say(f"block {number + 1} of {len(moe)}: {place.call.path or type(model).__name__}")
        done = blocks.attempt(place)
        attempts.append((place, done))
        _note_passes(done, model, outcome, options)
        if dump is not None:
            path = done.path or next((level.path for level in levels_of(place)), "")
            name, block = path or type(model).__name__, model.get_submodule(path)
            dump.block(name, block, outcome.calls.get(path), done.rewrite, done.reason, done.others)
    return attempts


def _check_hints(model: nn.Module, moe: list[BlockCandidate], options: Options) -> None:
    """``UsageError`` for a hint whose pattern matches none of the modules that were tried."""
    tried = {c.path or type(model).__name__ for p in moe for c in levels_of(p)}
    unused = [p for p in options.hints if p and not any(fnmatch.fnmatch(path, p) for path in tried)]
    if unused:
        raise UsageError(
            f"hints[{unused[0]!r}] matches no block; the places that were looked at are "
            f"{', '.join(sorted(repr(path) for path in tried)) or 'none'}"
        )


def _rewrite_dense(
    model: nn.Module, dense: list[BlockCandidate], outcome: PipelineResult, options: Options,
    runtime: Runtime | None, manager: PassManager, dump: Dump | None,
) -> dict[int, DenseResult]:  # fmt: skip
    """What became of each dense FFN, by the identity of its place."""
    found = rewrite_all(model, dense, outcome.calls, options, runtime, outcome.rewrites, options.say, manager)
    for one in {s.path: s for s in found}.values():
        _keep(outcome, one.records, options)
        if dump is not None and one.rewrite is not None:
            name, home = one.path or type(model).__name__, model.get_submodule(one.path)
            dump.block(name, home, outcome.calls.get(one.path), one.rewrite, one.reason)
    outcome.checks += list({s.path: s.rewrite.check for s in found if s.rewrite is not None}.values())
    return {id(p): s for p, s in zip(dense, found, strict=True)}


def _without_values(model: nn.Module, reason: str) -> Iterator[BlockReport]:
    """A declined entry for each module that holds experts, by structure alone: a meta model cannot run."""
    for path, module in model.named_modules():
        stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if len(stacked) >= 2 or feed_forward_lists(module):
            yield BlockReport(
                path or type(model).__name__, "moe", "declined", reason,
                stacked[0].shape[0] if len(stacked) >= 2 else len(feed_forward_lists(module)),
            )  # fmt: skip


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
    for record in records:
        if record.printed(options.print_passes):
            print(f"moeopt: {record}", file=sys.stderr, flush=True)
