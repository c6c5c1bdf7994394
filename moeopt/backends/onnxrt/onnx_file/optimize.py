"""One file through the steps of a model: find, read as modules, rewrite, verify, lower, stitch, compare."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from moeopt.backends.base import Made
from moeopt.backends.onnxrt.engine import GraphEngine
from moeopt.backends.onnxrt.expert_ids import ids_of_model
from moeopt.backends.onnxrt.graph_backend import GraphBackend
from moeopt.backends.onnxrt.onnx_file.beside_regions import blocks_beside_regions
from moeopt.backends.onnxrt.onnx_file.compare_files import (
    against_file,
    compare_files,
    count_ids,
    written_out,
)
from moeopt.backends.onnxrt.onnx_file.file_reports import UNREACHED, decline, in_order, inner_values, replaceable_note
from moeopt.backends.onnxrt.onnx_file.kept_codes import keep_codes, with_codes
from moeopt.backends.onnxrt.onnx_file.original import NO_MORE_ROUNDS, fingerprint, session_on
from moeopt.backends.onnxrt.onnx_file.parts import FilePart, FileParts, file_parts, widest_run
from moeopt.backends.onnxrt.onnx_file.quicker_file import SlowerRegions
from moeopt.backends.onnxrt.onnx_file.write import untouched, write_stitched
from moeopt.backends.onnxrt.open_engine import opened_file
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.process_variables import variables, variables_note
from moeopt.backends.onnxrt.session import GRAPH, NATIVE
from moeopt.bundle.mapped_file import give_back
from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.capture.tree import ArgsKwargs
from moeopt.codes_in_files import codes_in
from moeopt.errors import Declined, MoeoptError, NotEquivalentError, UsageError
from moeopt.onnx_in.ends import graph_inputs, tensor_type
from moeopt.onnx_in.feeds import OTHER_SIZES, GraphFeeds, given_feeds, made_up_feeds, resized
from moeopt.onnx_in.frozen_routing import BROKEN, frozen_routing
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.left_alone import left_alone, no_pairs
from moeopt.onnx_in.read import OnnxFile
from moeopt.onnx_in.region_module import GraphRegions
from moeopt.onnx_in.regions import CandidateRegion, candidate_regions
from moeopt.options import Options
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.report import BlockReport, Report
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.judge import EPS_ALLOWANCE

_SAMPLES = 24
"""Made up where two choose too few experts."""


class NothingRewrittenError(Exception):
    """Every region of a file was declined; never leaves this module."""


def optimize_file(
    file: OnnxFile, inputs: PyObject, options: Options, plan: PyObject, backend: type[GraphBackend]
) -> tuple[Made, ArgsKwargs]:
    """The file with its blocks of experts rewritten, as an engine; and the example call that it was made with.

    Args:
        backend: what makes an engine of the regions.

    Raises:
        UsageError: ONNX Runtime does not load or run it; inputs that it does not take.
    """
    if options.target not in (None, "cpu") or not isinstance(plan, OrtPlan) or plan.provider != "cpu":
        raise UsageError(
            f"{file.name}: an ONNX file is optimised for the CPU of this machine, where both files are compared; leave "
            "out device= and target=, or optimise the PyTorch model for the other device"
        )
    folder = TemporaryFolder()  # floats of codes lie there, and not in memory
    with codes_in(Path(folder.name)):
        return _optimized(file, inputs, options, plan, backend)


def _optimized(
    given: OnnxFile, inputs: PyObject, options: Options, plan: OrtPlan, backend: type[GraphBackend]
) -> tuple[Made, ArgsKwargs]:
    started = time.perf_counter()
    options.say("looking for blocks of experts in the graph")
    calls = example_feeds(given, inputs, options.seed)
    file, candidates, parts, made = _tried(given, calls, options, plan, backend, ())
    if inputs is None and any(UNREACHED in reason for _, reason in parts.declined.values()):  # by samples, it may be
        calls = example_feeds(given, None, options.seed, _SAMPLES)
        file, candidates, parts, made = _tried(given, calls, options, plan, backend, ())
    if made is not None and parts.declined:  # what a declined block's branches spare would be computed always
        stay = inner_values(parts)
        if len(written_out(given, calls, stay).proto.graph.node) != len(file.proto.graph.node):
            file, candidates, parts, made = _tried(given, calls, options, plan, backend, stay)
    others = list(left_alone(file.model.graph))
    beside, unread = blocks_beside_regions(file, calls[0], candidates, options)
    others += no_pairs(file.model.graph, candidates, {one.experts for one in others} | {b.experts for b in beside})
    if made is None:
        made = _left_alone(given, parts, bool(others or beside), options)
    broken = [f"{name}: {reason}" for name, (_, reason) in parts.declined.items() if reason.startswith(BROKEN)]
    made.built.variables = variables(node.op_type for node in file.model.graph.all_nodes())
    broken += [*variables_note(made.built.variables), *unread]
    made.report = dataclasses.replace(made.report, notes=(*made.report.notes, *broken))
    made.certificate.notes += broken
    blocks = in_order(file, made.report.blocks, parts, [c.name for c in candidates])
    made.report = dataclasses.replace(
        made.report,
        blocks=(*blocks, *beside, *(BlockReport(o.name, "moe", "declined", o.reason, o.experts) for o in others)),
        model=file.name,
        seconds=time.perf_counter() - started,
    )
    made.source = fingerprint(file)
    return made, ((), dict(calls[0]))


def _tried(
    given: OnnxFile, calls: Sequence[GraphFeeds], options: Options, plan: OrtPlan, backend: type[GraphBackend],
    stay: Collection[str] | None,
) -> tuple[OnnxFile, list[CandidateRegion], FileParts, Made | None]:  # fmt: skip
    """The file with its bodies written out but for those that ``stay``, its regions, and what was made of them."""
    file = written_out(given, calls, stay)
    candidates = list(candidate_regions(GraphIndex(file.model.graph)))
    parts = file_parts(file, candidates, calls, options.say)
    try:
        slower = SlowerRegions(given, file, parts, calls, options, plan)
        made = _rewritten(file, parts, calls, options, plan, backend, slower) if parts.parts else None
    except NotEquivalentError as err:  # the file that was given stays
        made = None
        for part in parts.parts:
            parts.declined.setdefault(part.name, (part.candidate, f"it was rewritten, compared and reverted: {err}"))
    return file, candidates, parts, made


def example_feeds(file: OnnxFile, inputs: PyObject, seed: int, samples: int = 2) -> list[GraphFeeds]:
    """Two calls, the second in other sizes where the file takes some: the user's, or of ``samples`` made up ones.

    Raises:
        UsageError: the file takes none of the inputs that were made up; or not those that were given.
    """
    session = session_on(file.proto, file.directory, file.name)
    dims = {v.name: tensor_type(file, v)[1] for v in graph_inputs(file.proto.graph)}
    if inputs is not None:
        given = given_feeds(file, inputs)
        stops = _runs(session, given)
        if stops is not None:
            raise UsageError(f"{file.name}: {stops}{_may_be_broken(file)}")
        return [given, *_in_another_size(session, given, dims)]
    found: list[GraphFeeds] = []
    said = ""
    for feeds in made_up_feeds(file, seed, samples):
        why = _runs(session, feeds)
        said = said or (why or "")
        if NO_MORE_ROUNDS in (why or ""):
            break  # other inputs would take as long
        sizes = {tuple(t.shape) for t in feeds.values()}
        if why is None and sizes not in [{tuple(t.shape) for t in one.values()} for one in found]:
            found.append(feeds)
        if len(found) == 2 or (found and all(isinstance(d, int) for shape in dims.values() for d in shape)):
            return found
    if found:
        return [*found, *_in_another_size(session, found[0], dims)]
    takes = ", ".join(f"{name} {dims[name]}" for name in dims)
    raise UsageError(
        f"{file.name} does not run on inputs that were made up for it: {said}; give example inputs: "
        f"moeopt.optimize(path, {{...}}) with {takes}{_may_be_broken(file)}"
    )


def _in_another_size(session: PyObject, feeds: GraphFeeds, dims: Mapping[str, list[PyObject]]) -> Iterator[GraphFeeds]:
    """One call at most: with all of its free sizes larger, or with one of them where the file does not take that; by
    one, or multiplied."""
    symbols = dict.fromkeys(d for shape in dims.values() for d in shape if isinstance(d, str))
    frees: list[set[str | None]] = [{*symbols, None}]
    frees += [{symbol} for symbol in symbols]
    for size_of, free in itertools.product(OTHER_SIZES, frees):
        only = {name: [d if d in free else 0 for d in shape] for name, shape in dims.items()}
        other = resized(feeds, only, size_of)
        if other is not None and _runs(session, other) is None:
            yield other
            return


def verify_file(
    original: OnnxFile, inputs: PyObject, engine: GraphEngine, before: Certificate, executed: bool = True
) -> Certificate:
    """Whether an engine still computes what the file that it was made of computes.

    Args:
        before: the certificate that the engine was made with; its budget holds here too.

    Raises:
        UsageError: the file takes other inputs than the engine.
    """
    wanted = [value.name for value in graph_inputs(original.proto.graph)]
    if wanted != list(engine.signature["parameters"]):
        raise UsageError(
            f"{original.name} takes {', '.join(wanted)}, and the engine takes "
            f"{', '.join(engine.signature['parameters'])}: it was made of another file"
        )
    end = before.end_to_end
    budget = end.budget if end is not None and end.budget > 0 else EPS_ALLOWANCE * torch.finfo(torch.float32).eps
    found = against_file(original, engine, example_feeds(original, inputs, 0), budget)
    return Certificate(end_to_end=found, executed=executed, dtype=before.dtype, device=engine.described)


def _may_be_broken(file: OnnxFile) -> str:
    """The end of a message on a file that does not run, where an export that froze its routing explains that."""
    candidates = list(candidate_regions(GraphIndex(file.model.graph)))
    found = ((c.name, frozen_routing(c, candidates)) for c in candidates)
    return next((f". In {name} {reason}" for name, reason in found if reason), "")


def _runs(session: PyObject, feeds: GraphFeeds) -> str | None:
    """Why a session does not run, or None."""
    try:
        session.run(feeds)
    except MoeoptError as err:
        return str(err)
    return None


def _rewritten(
    file: OnnxFile, parts: FileParts, calls: Sequence[GraphFeeds], options: Options, plan: OrtPlan,
    backend: type[GraphBackend], slower: SlowerRegions,
) -> Made | None:  # fmt: skip
    """The file with what could be rewritten of its parts; None where that is nothing."""
    order = {value.name: at for at, node in enumerate(file.model.graph) for value in node.outputs}
    slots = sorted({n for part in parts.parts for n in part.entries}, key=lambda name: (order.get(name, -1), name))
    place = {name: number for number, name in enumerate(slots)}
    regions = GraphRegions([(p.name, p.module, [place[n] for n in p.entries]) for p in parts.parts]).eval()
    chosen = widest_run(parts.parts)
    values = {name: value for part in parts.parts for name, value in part.runs[chosen].items()}
    call: ArgsKwargs = (tuple(values[name] for name in slots), {})
    seen: list[tuple[GraphRegions, PipelineResult]] = []
    of_codes = with_codes(options, parts.parts)

    def settle(twin: nn.Module, outcome: PipelineResult) -> None:
        """Leave out of the engine what was declined."""
        assert isinstance(twin, GraphRegions), "the pipeline copies the regions as what they are"
        if of_codes is not options:
            keep_codes(twin, outcome)
        slower.leave(twin, outcome)
        seen.append((twin, outcome))
        for one in (twin, regions):
            one.keep(list(outcome.rewrites))
        if not twin.region_slots:
            raise NothingRewrittenError

    try:
        made = backend(settle, "the file").optimize(regions, call, of_codes, plan)
    except NothingRewrittenError:
        decline(parts, seen[0][1].blocks)
        return None
    ((twin, outcome),) = seen
    regions_built, report, certificate = made.built, made.report, made.certificate
    del made  # its session: two would hold the weights twice
    give_back()
    kept = [part for part in parts.parts if part.name in outcome.rewrites]
    try:
        built = write_stitched(file, regions_built, kept, slots)
    except Declined as err:
        for part in kept:
            parts.declined[part.name] = part.candidate, err.reason
        return None
    graph = NATIVE if built.native else GRAPH
    engine = opened_file(built, options, graph)
    if options.verify != "off":
        options.say("comparing the new file with the one that was given")
        end = compare_files(file, engine, calls, _scales(kept), options.seed)
        own = ids_of_model(twin, call)
        end.ids, end.ids_differ, first = count_ids(engine, built, own, calls[chosen])
        if first:
            end.notes.append(f"the result stays within its budget although some experts differ; the first is {first}")
        certificate = dataclasses.replace(certificate, end_to_end=end, device=engine.described)
    report = dataclasses.replace(report, certificate=certificate)
    return Made(engine, report, certificate, None, built)


def _scales(parts: Sequence[FilePart]) -> dict[str, float]:
    from moeopt.backends.onnxrt.onnx_file.compare_files import eps_of

    return {p.region.exit.name: max(p.distance, eps_of(p.runs[0][p.region.exit.name])) for p in parts}


def _left_alone(file: OnnxFile, parts: FileParts, others: bool, options: Options) -> Made:
    """The file as it is, as an engine."""
    built = untouched(file)
    engine = opened_file(built, options, GRAPH)
    if parts.parts or parts.declined or others:
        note = "no block of experts in the file was rewritten: it is left as it is, and each block says why"
    else:
        note = "there is no block of experts in the file: it is left as it is"
    notes = [note, *replaceable_note(file)]
    certificate = Certificate(level=options.verify, device=engine.described, notes=list(notes))
    report = Report((), file.name, "onnxruntime", notes=tuple(notes), certificate=certificate)
    return Made(engine, report, certificate, None, built)
