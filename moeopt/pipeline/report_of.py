"""The report of one run of the pipeline."""

from __future__ import annotations

from torch import nn

from moeopt.listed import listed
from moeopt.options import Options
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.pipeline.diagram import block_diagram
from moeopt.report import BlockReport, Report
from moeopt.verification.certificate import Certificate


def report_of(
    source: nn.Module, blocks: list[BlockReport], backend: str, outcome: PipelineResult, certificate: Certificate,
    options: Options,
) -> Report:  # fmt: skip
    """The report, with a picture of the first MoE block that was rewritten and stayed so."""
    kept = {b.name for b in blocks if b.status == "rewritten" and b.kind == "moe"}
    graph, notes = None, [*outcome.notes, *_left_out(outcome, kept, type(source).__name__)]
    for path, rewrite in outcome.rewrites.items():
        name = path or type(source).__name__
        if name in kept:
            try:
                graph = block_diagram(name, rewrite, source.get_submodule(path))
            except Exception as err:  # a picture must not fail a model that was rewritten
                notes.append(f"{name} could not be drawn ({type(err).__name__}: {err})")
            break
    return Report(
        tuple(blocks), type(source).__name__, backend, outcome.seconds, tuple(notes), graph, certificate,
        tuple(outcome.passes), options.print_passes,
    )  # fmt: skip


def _left_out(outcome: PipelineResult, kept: set[str], model: str) -> list[str]:
    """Notes for what code of rewritten blocks does outside of the model: numbers that it counts in, what it asks."""
    counting: dict[str, list[str]] = {}
    asking: dict[tuple[str, ...], list[str]] = {}
    for path, rewrite in outcome.rewrites.items():
        reads = rewrite.program.reads
        for place in reads.effects if reads is not None and (path or model) in kept else ():
            counting.setdefault(place, []).append(path or model)
        if reads is not None and reads.ran.outside and (path or model) in kept:
            asking.setdefault(reads.ran.outside, []).append(path or model)
    told = [
        f"the code of {listed(names)} asks {listed(places)}, and nobody watches that: what the answers decided when it "
        "was verified stays decided; optimise again where that changes"
        for places, names in asking.items()
    ]
    return told + [
        f"the code of {listed(names)} changes {place} at each call, and the rewritten code does not: read such a count "
        "elsewhere, or hook the block"
        for place, names in counting.items()
    ]


def how_to_save(outcome: PipelineResult) -> list[str]:
    """A note where a declined block's Python may keep the whole model from being exported: what can be saved."""
    if not outcome.steered:
        return []
    names = list(dict.fromkeys(outcome.steered))
    alone = next((f"({path!r}), {path}'s" for path in outcome.rewrites if path), "(name), its")
    return [
        f"{listed(names)}: left with Python that depends on the values of tensors, so .save() and engines may refuse "
        "the whole model. torch.save(optimized.model, file) keeps it with its own code; a rewritten block becomes a "
        f"bundle alone: moeopt.optimize(model.get_submodule{alone} inputs).save(folder)"
    ]
