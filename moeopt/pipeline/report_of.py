"""The report of one run of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from moeopt.listed import listed
from moeopt.options import Options
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.pipeline.diagram import block_diagram
from moeopt.report import BlockReport, Report
from moeopt.rewrite.reads import Reads
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


_COMPILED = frozenset((
    "is_compiling", "is_dynamo_compiling", "is_torchdynamo_compiling", "is_exporting", "is_in_onnx_export",
))  # fmt: skip


def _left_out(outcome: PipelineResult, kept: set[str], model: str) -> list[str]:
    """Notes for what code of rewritten blocks does besides its numbers: what it counts, and what it asks."""
    found: dict[str, list[str]] = {}
    for path, rewrite in outcome.rewrites.items():
        reads, sizes = rewrite.program.reads, rewrite.program.guard.sizes
        if (path or model) in kept:
            for words in (*_words_of(reads), *([] if sizes is None else [_SIZES.format(sizes.text)])):
                found.setdefault(words, []).append(path or model)
    return [f"the code of {listed(names)} {words}" for words, names in found.items()]


_SIZES = (
    "computes with sizes of its input ({}), and was verified for those of its cases and for such as are alike to it: "
    "calls of others run the block's own code, and an engine refuses them; write it as tensor operations to have all "
    "sizes rewritten"
)


def _words_of(reads: Reads | None) -> Iterator[str]:
    if reads is None:
        return
    for place in reads.effects:
        yield (
            f"changes {place} at each call, and the rewritten code does not: read such a count elsewhere, or hook the "
            "block"
        )
    if reads.ran.outside:
        yield (
            f"asks {listed(reads.ran.outside)}, and nobody watches that: what the answers decided when it was verified "
            "stays decided; optimise again where that changes"
        )
    if asked := sorted(_COMPILED & reads.ran.names):
        yield (
            f"asks {listed(asked)}: compiled and exported, the rewritten code computes what was verified, which is "
            "what it computes when it is neither"
        )
