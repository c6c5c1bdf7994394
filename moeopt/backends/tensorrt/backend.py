"""The TensorRT backend: a plan for one GPU architecture, built on any machine, and its ONNX form as evidence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from moeopt.backends.base import Made, Opened
from moeopt.backends.onnxrt.build import Built
from moeopt.backends.onnxrt.engine import GraphEngine
from moeopt.backends.onnxrt.graph_backend import GraphBackend
from moeopt.backends.onnxrt.offline_engine import AbsentEngine
from moeopt.backends.onnxrt.session import why_absent
from moeopt.backends.tensorrt.build_engine import TrtBuilt, build_trt
from moeopt.backends.tensorrt.bundle import THROUGH_ONNX, load_trt_bundle, needs_of, save_trt_bundle
from moeopt.backends.tensorrt.engine import TensorRTEngine, built_not_executed, here
from moeopt.backends.tensorrt.engine_plan import EnginePlan, most_tokens, trt_plan
from moeopt.backends.tensorrt.runtime import lacking
from moeopt.backends.tensorrt.target import local_target
from moeopt.bundle.manifest import Manifest, read_manifest
from moeopt.errors import UsageError
from moeopt.find.example_inputs import Call
from moeopt.limits import LoadLimits
from moeopt.options import Options
from moeopt.pipeline.run import Outcome


class TensorRTBackend(GraphBackend):
    """An engine of TensorRT, or of TensorRT for RTX."""

    name = "tensorrt"

    def _plan_impl(self, options: Options) -> EnginePlan:
        return trt_plan(options)

    def runs_on_gpu(self, plan: EnginePlan) -> bool:
        return plan.target == local_target()

    def _run_impl(self, twin: nn.Module, call: Call, options: Options, plan: Any) -> Outcome:
        plan.most = most_tokens(call, options)
        outcome = super()._run_impl(twin, call, options, plan)
        if plan.refusals:
            refused = next((b.name for b in outcome.blocks if b.kind == "moe" and b.status == "declined"), None)
            if refused is not None:
                raise UsageError(f"{refused}: {plan.refusals[0]}")
        return outcome

    def _build_impl(self, twin: nn.Module, call: Call, plan: EnginePlan, options: Options) -> TrtBuilt:
        return build_trt(twin, *call, plan, options)

    def _opened_impl(self, built: TrtBuilt, plan: EnginePlan, options: Options) -> GraphEngine | AbsentEngine:
        return built.opened()

    def _lowering_impl(self, path: str, built: TrtBuilt) -> str:
        return built.lowering_of(path)

    def _graph_of(self, built: TrtBuilt) -> Built:
        return built.graph

    def _notes_impl(self, built: TrtBuilt) -> list[str]:
        return [built.summary()]

    def _save_impl(self, made: Made, call: Call, directory: str | os.PathLike[str]) -> Path:
        return save_trt_bundle(made.model, made.built, directory, made.report, made.certificate, call, made.source)

    def _open_impl(
        self, directory: str | os.PathLike[str], device: Any, session_options: Any, limits: LoadLimits
    ) -> Any:
        return load_trt_bundle(directory, device, session_options=session_options, limits=limits)

    def _open_to_verify_impl(self, manifest: Manifest, provider: str | None, limits: LoadLimits) -> Opened:
        """The plan where it runs, else its ONNX form on the CPU."""
        engine = load_trt_bundle(manifest.directory, provider, replay=False, limits=limits)
        if isinstance(engine, AbsentEngine):
            engine = load_trt_bundle(manifest.directory, "cpu", replay=False, limits=limits)
        executed = isinstance(engine, TensorRTEngine) or engine.provider != "cpu"
        device = engine.described if executed else built_not_executed(needs_of(manifest))
        return Opened(engine, executed, device, engine.notes)

    def provider_names(self) -> tuple[str, ...]:
        return ("cuda", "cpu", *THROUGH_ONNX)

    def providers(self, directory: str | os.PathLike[str]) -> dict[str, str]:
        """The plan runs on "cuda", its ONNX form on the others."""
        needs = needs_of(read_manifest(directory))
        missing = lacking(needs, here(needs))
        others = why_absent(self.provider_names()[1:], alone=missing != "")
        return {"cuda": missing, **others}
