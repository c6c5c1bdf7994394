"""What backends have in common whose engine is an ONNX graph: build, compare, certify; replay where it cannot run."""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from moeopt.backends.base import Backend, Made, Otherwise
from moeopt.backends.onnxrt.attempts import attempts
from moeopt.backends.onnxrt.build import BuiltGraph
from moeopt.backends.onnxrt.bundle import native_note, replay_golden
from moeopt.backends.onnxrt.check_routers import Routed, check_blocks
from moeopt.backends.onnxrt.compare_engine import KnownRuns, compare_engine, weighted
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.expert_ids import count_ids
from moeopt.backends.onnxrt.offline_engine import OfflineEngine
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.rounded_activations import called_plainly, check_rounding, rounded_engine
from moeopt.backends.onnxrt.ties import Ties, form_of, tie_note, ties_of
from moeopt.bundle.fingerprint import fingerprint
from moeopt.bundle.holds import notes_on_sizes
from moeopt.bundle.manifest import Manifest
from moeopt.bundle.mapped_file import give_back
from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import NotEquivalentError
from moeopt.limits import LoadLimits
from moeopt.lower.export_errors import declined_blocks_named
from moeopt.lower.onnx.plan import BlockPlan
from moeopt.lower.plain_call import open_dataclasses
from moeopt.lower.wrapped_weights import wrapped_weights_named
from moeopt.onnx_in.coded import coded_weights
from moeopt.options import Options
from moeopt.passes.quantize_experts import BankRows
from moeopt.patches import fewer_collections
from moeopt.pipeline.block import OwnForward
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.pipeline.enclosing import with_router
from moeopt.pipeline.report_of import report_of
from moeopt.pipeline.run import run
from moeopt.quantization.calibration import Calibrated, calibrate
from moeopt.quantization.measure_loss import data_of, measure_loss
from moeopt.quantization.quantized_again import quantized_again
from moeopt.quantization.quantized_model import (
    check_codes,
    formats_of,
    method_of,
    notes_of,
    quantized_original,
    routed_banks,
)
from moeopt.quantization.quantized_products import quantize_products
from moeopt.report import BlockReport
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.model import EndToEnd, OriginalRuns


class GraphBackend(Backend):
    """An engine of the rewritten model, each block verified as its lowering computes it, then the whole.

    Where the engine cannot run here, both verdicts are those of its CPU fallback graph.

    Args:
        settle: called with the rewritten copy and the pipeline's result before the engine is built; None: nothing is.
        origin: what notes call the thing that the engine stands for.
    """

    streamed_takes = (3, 5)  # the graph's own weights file and the bundle's copy; blocks are built one by one

    def __init__(
        self, settle: Callable[[nn.Module, PipelineResult], None] | None = None, origin: str = "PyTorch"
    ) -> None:
        self._settle, self._origin = settle, origin

    def _optimize_impl(self, source: nn.Module, call: ArgsKwargs, options: Options, plan: PyObject) -> Made:
        data, calibrated = data_of(source, call, options), calibrate(source, call, options)

        def make(options: Options, plan: PyObject) -> Made:
            made = self._of_copy(source, call, options, plan, data, calibrated)
            self._graph_of(made.built).options = dataclasses.replace(options, calibration=calibrated.calls or None)
            made.certificate.notes += calibrated.notes(data)
            return made

        return attempts(make, options, plan, self.plan)

    def _of_copy(
        self, source: nn.Module, call: ArgsKwargs, options: Options, plan: PyObject, data: list[ArgsKwargs],
        calibrated: Calibrated,
    ) -> Made:  # fmt: skip
        shared: list[str] = []
        twin = shared_copy(source, shared)
        with open_dataclasses(call), wrapped_weights_named(twin):
            made = self._engine(source, twin, call, options, plan, data, calibrated)
        made.report = dataclasses.replace(made.report, notes=(*made.report.notes, *shared))
        return made

    def _engine(
        self, source: nn.Module, twin: nn.Module, call: ArgsKwargs, options: Options, plan: PyObject,
        data: list[ArgsKwargs], calibrated: Calibrated,
    ) -> Made:  # fmt: skip
        outcome = self._settled(twin, self._run_impl(twin, call, options, plan, calibrated.rows))
        check_codes(outcome, twin, options)
        products = quantize_products(source, twin, outcome, call, options, calibrated.calls)
        judge = quantized_original(source, twin, products)
        with fewer_collections():
            with declined_blocks_named(outcome.blocks):
                built = self._build_impl(twin, call, plan, options)
            form = self._graph_of(built)
            rounding = check_rounding(form.directory) if isinstance(plan, OrtPlan) and plan.rounds else None
            engine = self._opened_impl(built, plan, options)
        runner, executed = self.runner(engine)

        def count(one: ArgsKwargs) -> tuple[int, int, str]:
            """Expert ids inside an engine that ONNX Runtime runs; another runtime does not show them."""
            if not isinstance(runner, OnnxEngine):
                return 0, 0, ""
            return count_ids(twin, runner, runner.graph, form_of(runner, form).sites, one)

        notes, known = self._check_routers(judge, twin, runner, form, outcome, plan, options), KnownRuns()

        def ties_from(noise: list[str]) -> Ties | None:
            return ties_of(twin, runner, form, noise, options.seed)

        end = compare_engine(judge, runner, call, outcome, options, count, ties_from, known)
        if form.native:  # what was compared is what runs where moeopt's own operator is not
            plain_end = end
            del engine, runner  # two sessions would hold the weights twice
            give_back()
            engine = runner = self._native_impl(built, plan, options)
            try:
                end = compare_engine(judge, runner, call, outcome, options, count, ties_from, known)
                notes.append(native_note(form.native))
            except NotEquivalentError as err:
                form.reasons |= {name: f"{form.lowerings[name]}, native was given up" for name in form.native["blocks"]}
                end, form.native = plain_end, {}
                notes.append(f"moeopt's native kernel was given up: {err}")
                engine = self._opened_impl(built, plan, options)
                runner, executed = self.runner(engine)
        activations: dict[str, float] = {}
        if rounding is not None:
            again = functools.partial(self._native_impl if form.native else self._opened_impl, built, plan, options)
            engine, activations = rounded_engine(engine, form.directory, rounding, again, self.comparable, call)
            runner = engine
        certificate = self._certificate(source, twin, engine, runner, executed, form, call, outcome, end, plan, notes)
        certificate.products, certificate.activations, certificate.level = products.formats, activations, options.verify
        certificate.method = method_of(certificate, options)
        if judge is not source and options.verify != "off" and not coded_weights(source):  # a file loses nothing
            runs = called_plainly(runner, self.comparable) if activations else None
            certificate.loss = measure_loss(source, twin, data, routed_banks(outcome, twin), options, products, runs)
        blocks = [self._with_lowering(block, built) for block in outcome.blocks]
        report = report_of(source, blocks, self.name, outcome, certificate, options)
        told = [*notes_of(outcome, twin, options, products), *products.note()]
        report = dataclasses.replace(
            report, notes=(*report.notes, *told, *plan.notes, *self._notes_impl(built), *notes)
        )
        return Made(engine, report, certificate, fingerprint(source), built)

    def _certificate(
        self, source: nn.Module, twin: nn.Module, engine: PyObject, runner: GraphEngine, executed: bool,
        form: BuiltGraph, call: ArgsKwargs, outcome: PipelineResult, end: EndToEnd | None, plan: PyObject,
        notes: list[str],
    ) -> Certificate:  # fmt: skip
        """The certificate but for what was lost; ``notes`` gets those on ties and sizes."""
        moved = sum(case.ties for check in outcome.checks for case in check.cases if case.name.endswith(runner.runtime))
        counted, own = (None, 0) if end is None else (moved, end.ties)
        if ties := tie_note(twin, call, runner.runtime, counted, own, self._origin):
            notes.append(ties)
        notes[:0] = notes_on_sizes(form.signature)
        first = next(source.parameters(), None)
        device = engine.described if executed else engine.built_for
        dtype = str(first.dtype).removeprefix("torch.") if first is not None else ""
        return Certificate(
            outcome.checks, end, executed=executed, device=device, dtype=dtype, notes=[*plan.notes, *notes],
            quantized=formats_of(twin),
        )  # fmt: skip

    def _settled(self, twin: nn.Module, outcome: PipelineResult) -> PipelineResult:
        if self._settle is not None:
            self._settle(twin, outcome)
        return outcome

    def keeps_cache(self, made: Made) -> bool:
        return getattr(made.model, "causal_lm", None) is not None

    def _check_routers(
        self, source: nn.Module, twin: nn.Module, engine: GraphEngine, form: BuiltGraph, outcome: PipelineResult,
        plan: PyObject, options: Options,
    ) -> list[str]:  # fmt: skip
        """Each kind of block on ONNX Runtime with its router, in strict mode; notes for report and certificate."""
        if options.verify != "strict" or not isinstance(engine, OnnxEngine) or not isinstance(plan, OrtPlan):
            return []
        options.say("running the blocks' routers on the runtime")
        blocks = []
        for path, rewrite in outcome.rewrites.items():
            around = with_router(path, outcome.calls)
            if around is not None and (around[0] or engine.causal_lm is None):
                experts = max(len(found.experts) for found in rewrite.found)
                blocks.append(Routed(around[0], outcome.calls[around[0]], around[1], experts, rewrite.check))
        return check_blocks(lambda p: OwnForward(source.get_submodule(p)), twin, blocks, form, plan, options.seed)

    def _with_lowering(self, block: BlockReport, built: PyObject) -> BlockReport:
        """The block with what runs it in the engine; a module that is called twice has a site for each call."""
        if block.status != "rewritten":
            return block
        paths = {site.split("#")[0] for site in self._graph_of(built).reasons}
        own = block.name if block.name in paths else "experts"  # the root module's sites have no path
        return dataclasses.replace(block, lowering=self._lowering_impl(own, built) or block.lowering)

    def _replay_impl(self, manifest: Manifest, engine: PyObject, limits: LoadLimits) -> PyObject:
        return replay_golden(engine, limits)

    def tie_comparison(
        self, original: nn.Module, engine: PyObject, call: ArgsKwargs, noise: Sequence[str], built: PyObject = None
    ) -> Otherwise | None:
        """The blocks of ``original`` are rewritten only where the outputs differ; only ONNX Runtime tells its ids."""
        if not isinstance(engine, OnnxEngine):
            return None

        def otherwise(runs: OriginalRuns, got: PyObject) -> EndToEnd | None:
            twin = shared_copy(original)
            run(twin, call, Options(verify="off"))
            if built is None:
                ties = Ties.of_bundle(twin, engine, list(noise))
            else:
                ties = ties_of(twin, engine, self._graph_of(built), list(noise), 0)
            return None if ties is None else ties.compare(call, runs, got)

        return otherwise

    def judge(self, original: nn.Module, made: Made, call: ArgsKwargs) -> nn.Module:
        """``original`` is rewritten and quantised again: an engine has no modules to read codes from."""
        return quantized_again(original, call, made.certificate, self._graph_of(made.built).options)

    def runner(self, model: PyObject) -> tuple[GraphEngine, bool]:
        return (model.replay(), False) if isinstance(model, OfflineEngine) else (model, True)

    def facts(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Its provider, its graph, and how each block is lowered and why."""
        return {
            "provider": data.get("provider", "unknown"),
            "nodes": int(data.get("facts", {}).get("nodes", 0)),
            "lowerings": [
                f"{s['name']}: {s['lowering']} ({s['why'] or 'the first that fits'})" for s in data.get("sites", [])
            ],
        }

    def runs_on(self, engine: PyObject) -> str | None:
        if isinstance(engine, OfflineEngine):
            return None
        return engine.provider if isinstance(engine, OnnxEngine) else super().runs_on(engine)

    def comparable(self, engine: PyObject, call: ArgsKwargs) -> ArgsKwargs:
        if engine.causal_lm is None:
            return call
        return call[0], {**call[1], "use_cache": False}  # the cache is compared by what comes of it

    def noisy(self, original: nn.Module, blocks: Sequence[str]) -> list[str]:
        """Every module that has weights: the runtime computes each op anew."""
        return [*super().noisy(original, blocks), *weighted(original)]

    # what a subclass writes

    def _run_impl(
        self, twin: nn.Module, call: ArgsKwargs, options: Options, plan: BlockPlan, rows: BankRows
    ) -> PipelineResult:
        """The pipeline over the model's copy ``twin``; ``rows``: what a plan's method weighs by."""
        return run(twin, call, options, plan, rows)

    @abstractmethod
    def _build_impl(self, twin: nn.Module, call: ArgsKwargs, plan: PyObject, options: Options) -> PyObject:
        """The engine's files, and a record of them."""

    @abstractmethod
    def _opened_impl(self, built: PyObject, plan: PyObject, options: Options) -> GraphEngine | OfflineEngine:
        """What was built, as an engine of this machine, or of one that can run it."""

    def _native_impl(self, built: PyObject, plan: PyObject, options: Options) -> OnnxEngine:
        """The engine of the graph with moeopt's own operator, where ``built`` has one."""
        raise NotImplementedError

    @abstractmethod
    def _lowering_impl(self, path: str, built: PyObject) -> str:
        """What runs the block at ``path``, in a line; "" where the engine does not hold it."""

    def _graph_of(self, built: PyObject) -> BuiltGraph:
        """The record of the ONNX graph among what was built."""
        graph: BuiltGraph = built
        return graph

    def _notes_impl(self, built: PyObject) -> list[str]:
        """Sentences on the engine for the report."""
        del built
        return []
