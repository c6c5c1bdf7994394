"""What becomes of one model's blocks, and what the report says of each, rewritten or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.find.block_candidates import BlockCandidate
from moeopt.ir.bank_format import BankFormat
from moeopt.ir.weight_refs import expert_paths, tensor_at
from moeopt.obstacles import Obstacle, Rank
from moeopt.passes.base import PassRecord
from moeopt.pipeline.block import Rewrite
from moeopt.pipeline.dense import DenseResult as DenseResult
from moeopt.pipeline.dense import function_of
from moeopt.pipeline.describe import dense_reason, describe_router, read_router
from moeopt.pipeline.lowering_text import ON_CODES, lowering_text
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router import RouterReading
from moeopt.report import BlockReport
from moeopt.verification.results import BlockCheck


@dataclass
class PipelineResult:
    """What became of a model's blocks; ``rewrites`` maps module paths to what was installed.

    ``passes`` has what each pass did to each block, those that were left as they are included; ``notes`` what the
    report's reader should know besides; ``steered`` names declined blocks, and modules around dense FFNs, whose Python
    depends on values of tensors.
    """

    blocks: list[BlockReport]
    checks: list[BlockCheck]
    rewrites: dict[str, Rewrite]
    calls: dict[str, ArgsKwargs]
    seconds: float = 0.0
    passes: list[PassRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steered: list[str] = field(default_factory=list)


@dataclass
class Attempt:
    rewrite: Rewrite | None = None
    path: str = ""
    reason: str = ""
    where: str = ""
    seconds: float = 0.0
    read: set[int] = field(default_factory=set)
    others: tuple[Obstacle, ...] = ()
    experts: int | None = None
    """How many experts were read; None where none were."""


def shared_blocks(model: nn.Module, attempts: list[tuple[BlockCandidate, Attempt]]) -> Iterator[BlockCandidate]:
    """What looked like one more expert of a rewritten block and is not: a shared expert."""
    for place, attempt in attempts:
        if attempt.rewrite is not None:
            experts = expert_parameters(model, attempt.path, attempt.rewrite.found)
            yield from (p for p in place.alone if not p.weights & experts)


def expert_parameters(model: nn.Module, path: str, recognitions: list[Recognition]) -> set[int]:
    """Identities of the Parameters that the experts of a rewritten module read."""
    module = model.get_submodule(path)
    return {id(tensor_at(module, p)) for f in recognitions for p in expert_paths(f.experts)}


def report_of_block(
    model: nn.Module,
    places: list[BlockCandidate],
    attempts: list[tuple[BlockCandidate, Attempt]],
    denses: dict[int, DenseResult],
    outcome: PipelineResult,
    seed: int,
) -> Iterator[BlockReport]:
    by_place = {id(p): a for p, a in attempts}
    for place in places:
        attempt = by_place.get(id(place))
        path = place.call.path
        if attempt is None:
            outcome.steered += _asking(model, place, outcome)
            yield _report_dense(model, place, denses.get(id(place)), outcome.calls.get(path), seed)
            continue
        read = attempt.rewrite is not None or bool(attempt.read)
        name = attempt.path or (path if not read else "") or type(model).__name__
        if attempt.rewrite is None:
            name = attempt.path or type(model).__name__
            outcome.steered += [name] if place.steered is not None else []
            yield BlockReport(
                name, "moe", "declined", attempt.reason, attempt.experts or place.experts or None,
                source=attempt.where or place.source, seconds=attempt.seconds,
                nearest=next((o.reason for o in attempt.others if o.rank >= Rank.FOUND), ""), obstacles=attempt.others,
            )  # fmt: skip
            continue
        seconds, told = attempt.seconds, set[int]()
        for found, inside in zip(attempt.rewrite.found, attempt.rewrite.routers, strict=True):
            weights = expert_parameters(model, attempt.path, [found])
            if weights & place.weights and told.isdisjoint(weights):  # two mixtures side by side may look like one
                yield _report_rewritten(model, name, attempt, attempt.rewrite, found, inside, outcome, seconds)
                seconds, told = 0.0, told | weights


def _asking(model: nn.Module, place: BlockCandidate, outcome: PipelineResult) -> list[str]:
    """The name of the module around a dense FFN whose Python asks for values; nothing where it was rewritten."""
    path = place.steered
    if path is None or any(not p or f"{path}.".startswith(f"{p}.") for p in outcome.rewrites):
        return []
    return [path or type(model).__name__]


def _report_rewritten(
    model: nn.Module, name: str, attempt: Attempt, rewrite: Rewrite, found: Recognition, inside: RouterReading,
    outcome: PipelineResult, seconds: float,
) -> BlockReport:  # fmt: skip
    router = read_router(model, attempt.path, outcome.calls, found, inside)
    coded = rewrite.program.block.coded.get(_number(rewrite, found))
    lowering = ON_CODES if coded is not None else lowering_text(model.get_submodule(attempt.path), found)
    return BlockReport(
        name, "moe", "rewritten", "", len(found.experts), describe_router(found, router),
        lowering + _in_codes(rewrite, found),
        rewrite.check.distance_rewritten if rewrite.check.passed is not None else None,
        found.source, seconds=seconds, top_k=found.routing.per_token,
        spec=str(found.spec if coded is None else coded.spec),
        router_spec=router.encode(),
    )  # fmt: skip


def _in_codes(rewrite: Rewrite, found: Recognition) -> str:
    """The format of quantised experts, to stand behind a lowering."""
    number, block = _number(rewrite, found), rewrite.program.block
    if (coded := block.coded.get(number)) is not None:
        return f", weights in {' and '.join(dict.fromkeys(str(m.format) for m in coded.matrices))}, read where they are"
    format = block.formats.get(number)
    if isinstance(format, BankFormat):  # codes of a checkpoint
        format = format.w_out.format
    return "" if format is None else f", weights in {format}"


def _number(rewrite: Rewrite, found: Recognition) -> int:
    return next(n for n, one in enumerate(rewrite.found) if one is found)


def _report_dense(
    model: nn.Module, place: BlockCandidate, done: DenseResult | None, call: ArgsKwargs | None, seed: int
) -> BlockReport:
    name = place.call.path or type(model).__name__
    if done is None or done.rewrite is None:
        spec = "" if call is None else function_of(model.get_submodule(place.call.path), call, place, seed)
        reason, where = (place.reason or dense_reason(place), "") if done is None else (done.reason, done.where)
        return BlockReport(name, "dense_ffn", "declined", reason, source=where or place.source, spec=spec)
    found = next(f for f in done.rewrite.found if expert_parameters(model, done.path, [f]) >= place.weights)
    return BlockReport(
        name, "dense_ffn", "rewritten", "", len(found.experts), "", done.lowering + _in_codes(done.rewrite, found),
        done.rewrite.check.distance_rewritten if done.rewrite.check.passed is not None else None,
        found.source, seconds=done.seconds, top_k=len(found.experts), spec=str(found.spec),
    )  # fmt: skip
