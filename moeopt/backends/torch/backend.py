"""The torch backend: the user's own module, its blocks rewritten; PyTorch runs it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moeopt.backends.base import Backend, Made, Opened
from moeopt.backends.refuse_quantize import refuse_engine_parts
from moeopt.backends.torch.bundle import load_torch_bundle, save_torch_bundle, verify_torch_bundle
from moeopt.backends.torch.golden import budget_and_edges
from moeopt.bundle.fingerprint import fingerprint
from moeopt.bundle.manifest import Manifest
from moeopt.capture.isolated_run import run_quietly
from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tape import clone_inputs
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import CaptureError, NotSaveableError, UsageError
from moeopt.limits import LoadLimits
from moeopt.lower.functional import export_functional
from moeopt.ops.native.library import missing
from moeopt.ops.override import default_impl
from moeopt.options import Options
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.pipeline.check_copy import check_copy
from moeopt.pipeline.check_gradients import check_gradients
from moeopt.pipeline.quicker_original import choose_original_calls
from moeopt.pipeline.report_of import report_of
from moeopt.pipeline.run import run
from moeopt.pipeline.still_saveable import how_to_save
from moeopt.pipeline.weights_in_memory import weights_note
from moeopt.quantization.calibration import calibrate
from moeopt.quantization.measure_loss import data_of, measure_loss
from moeopt.quantization.quantized_model import (
    check_patterns,
    formats_of,
    method_of,
    notes_of,
    quantized_original,
    routed_banks,
)
from moeopt.quantization.rounded_rows import round_rows
from moeopt.rewrite.install import install, uninstall
from moeopt.rewrite.store_codes import store_codes
from moeopt.rewrite.whole_model import called_as_verified, check_as_verified
from moeopt.value_types import JsonValue, PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.model import EndToEnd, end_to_end
from moeopt.verification.rounded import moved_by_rounding


def _check_it_runs(model: nn.Module, call: ArgsKwargs) -> None:
    """``NotSaveableError`` where a model that was changed after it was optimised fails on its example inputs."""
    try:
        run_quietly(model, *call)
    except CaptureError as err:
        raise NotSaveableError(
            f"{type(model).__name__} cannot be saved: it was changed after moeopt.optimize, and its example inputs "
            f"fail ({err}): change the model first (dtype=, device= of moeopt.optimize do), then optimise it"
        ) from err


def _golden_distance(certificate: Certificate) -> float | None:
    """What the graph in a bundle may differ by from the model that it was made of, per token; None: nobody measured it.

    The graph has the model's ops in other forms (a scan as a loop), and each of them rounds: as much as verification
    measured that rounding moves the outputs by.
    """
    if certificate.activations:
        return moved_by_rounding(certificate)
    end = certificate.end_to_end
    return float(end.budget) if end is not None and end.passed is True and end.budget > 0 else None


class TorchBackend(Backend):
    """The model stays of the user's own class, with its ``state_dict``, hooks and weights."""

    name = "torch"

    def _plan_impl(self, options: Options) -> None:
        refuse_engine_parts(options)
        for name in ("target", "profile", "timing_cache", "session_options", "portable"):
            if (given := getattr(options, name)) not in (None, False):
                raise UsageError(
                    f"{name}={given!r:.80} is for an engine, and backend='torch' builds none: give "
                    "backend='onnxruntime' or backend='tensorrt' as well, or leave it out"
                )

    def _optimize_impl(self, source: nn.Module, call: ArgsKwargs, options: Options, plan: None) -> Made:
        shared: list[str] = []
        data = data_of(source, call, options)
        twin = shared_copy(source, shared)
        calibrated = calibrate(source, call, options)
        outcome = run(twin, call, options, rows=calibrated.rows)
        outcome.notes += [*shared, *how_to_save(outcome)]
        check_patterns(outcome, options)
        if options.verify != "off":
            check_gradients(twin, outcome.rewrites, outcome.calls)
        certificate = _certify(source, twin, call, outcome, options)
        if certificate.passed is False:
            why = _revert(twin, outcome, certificate)
            certificate = _certify(source, twin, call, outcome, options)
            certificate.notes.append(why)
        if options.verify != "off" and not outcome.rewrites:
            check_copy(source, twin, call)
        outcome.notes += notes_of(outcome, twin, options)
        certificate.method = method_of(certificate, options)
        if options.quantize is not None and options.quantize.activations == "int8":
            certificate.activations, left = round_rows(twin, call)
            outcome.notes += left
            certificate.notes += left
        if certificate.lossy and options.verify != "off":
            certificate.loss = measure_loss(source, twin, data, routed_banks(outcome, twin), options)
            certificate.notes += calibrated.notes(data)
        if options.inplace and outcome.rewrites:
            for path, rewrite in outcome.rewrites.items():
                install(source.get_submodule(path), rewrite.program)
            twin = source
        outcome.notes += [f"{name} also holds other numbers than experts' weights, or is held elsewhere: its floats "
                          "stay beside the codes" for name in store_codes(twin)]  # fmt: skip
        if options.quantize is not None:
            outcome.notes.append(weights_note(twin, outcome))
        outcome.notes += choose_original_calls(twin, outcome)
        report = report_of(source, outcome.blocks, self.name, outcome, certificate, options)
        first = next(source.parameters(), None)
        grouped = any(b.status == "rewritten" and b.kind == "moe" for b in outcome.blocks)
        if grouped and first is not None and first.device.type == "cpu" and (why := missing()):
            note = f"the experts run on torch's matmuls, not on the faster native kernel: {why}"
            report = dataclasses.replace(report, notes=(*report.notes, note))
        return Made(twin, report, certificate)

    def _save_impl(self, made: Made, call: ArgsKwargs, directory: str | os.PathLike[str]) -> Path:
        args, kwargs = call
        check_as_verified(made.model, "a bundle")
        try:
            program = export_functional(made.model, args, kwargs)
        except NotSaveableError:
            _check_it_runs(made.model, call)
            raise
        copied = clone_inputs(call)  # a forward may write into its arguments
        with called_as_verified(made.model, "a bundle"), torch.no_grad(), default_impl():  # as the bundle runs it
            golden = made.model(*copied[0], **copied[1])
        distance, edges = budget_and_edges(made.model, call, golden, _golden_distance(made.certificate))
        return save_torch_bundle(
            program,
            directory,
            report=made.report,
            certificate=made.certificate,
            golden_inputs=[(args, kwargs)],
            golden_outputs=[golden],
            golden_distance=distance,
            golden_edges=[edges],
            source=fingerprint(made.model),
        )

    def _open_impl(
        self, directory: str | os.PathLike[str], device: PyObject, session_options: JsonValue, limits: LoadLimits
    ) -> PyObject:
        if session_options is not None:
            raise UsageError(
                f"session_options are ONNX Runtime's, and {directory} is a bundle for PyTorch: leave them out"
            )
        return load_torch_bundle(directory, device, limits)

    def _open_mapped_impl(
        self, directory: str | os.PathLike[str], device: PyObject, session_options: JsonValue, limits: LoadLimits,
        resident: int | None,
    ) -> PyObject:  # fmt: skip
        engine = load_torch_bundle(directory, device, limits, resident is not None)
        if resident is not None:
            engine.keep_resident(resident)
        return engine

    def _open_to_verify_impl(self, manifest: Manifest, provider: str | None, limits: LoadLimits) -> Opened:
        device = None if provider is None else _provider_device(provider)
        engine = load_torch_bundle(manifest.directory, device, limits)
        return Opened(engine, True, str(engine.device))

    def _replay_impl(self, manifest: Manifest, engine: PyObject, limits: LoadLimits) -> PyObject:
        return verify_torch_bundle(manifest.directory, str(engine.device), limits)

    def provider_names(self) -> tuple[str, ...]:
        return ("cpu", "cuda")

    def providers(self, directory: str | os.PathLike[str]) -> dict[str, str]:
        gpu = "" if torch.cuda.is_available() else "PyTorch sees no CUDA GPU on this machine"
        return {"cpu": "", "cuda": gpu}


def _certify(source: nn.Module, twin: nn.Module, call: ArgsKwargs, outcome: PyObject, options: Options) -> Certificate:
    end: EndToEnd | None = None
    if options.verify != "off" and outcome.rewrites:
        options.say("comparing the whole model end to end")
        end = end_to_end(
            quantized_original(source, twin), twin, *call, noise_blocks=list(outcome.rewrites), seed=options.seed
        )
    first = next(source.parameters(), None)
    return Certificate(
        blocks=outcome.checks,
        end_to_end=end,
        level=options.verify,
        device=str(first.device) if first is not None else "cpu",
        dtype=str(first.dtype).removeprefix("torch.") if first is not None else "",
        quantized=formats_of(twin),
    )


def _revert(twin: nn.Module, outcome: PipelineResult, certificate: Certificate) -> str:
    """A model that fails end to end goes back to its own code, block by block, with the reason; a note on it."""
    why = certificate.end_to_end.reason if certificate.end_to_end else "a block failed"
    for path in outcome.rewrites:
        uninstall(twin.get_submodule(path))
    reverted = [b.name for b in outcome.blocks if b.status == "rewritten"]
    outcome.blocks = [
        b
        if b.status == "declined"
        else dataclasses.replace(b, status="declined", reason=f"reverted: the whole model was not equivalent: {why}")
        for b in outcome.blocks
    ]
    outcome.passes = [
        r.reverted(f"the whole model was not equivalent: {why}") if r.fired else r for r in outcome.passes
    ]
    outcome.checks, outcome.rewrites = [], {}
    return f"{', '.join(reverted)} was rewritten and reverted, for the whole model was not equivalent: {why}"


def _provider_device(provider: str) -> str:
    name = provider.lower().removesuffix("executionprovider")
    usable: dict[str, Callable[[], bool]] = {"cpu": lambda: True, "cuda": torch.cuda.is_available}
    if name not in usable or not usable[name]():
        there = ", ".join(n for n, ok in usable.items() if ok())
        raise UsageError(f"provider {provider!r} is not on this machine; it has: {there}")
    return name
