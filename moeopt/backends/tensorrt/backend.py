"""The TensorRT backend: a plan for one GPU architecture, built on any machine, and its ONNX form as evidence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moeopt.backends.base import Made, Opened
from moeopt.backends.onnxrt.build import BuiltGraph
from moeopt.backends.onnxrt.engine import GraphEngine
from moeopt.backends.onnxrt.graph_backend import GraphBackend
from moeopt.backends.onnxrt.offline_engine import OfflineEngine
from moeopt.backends.onnxrt.providers import why_absent
from moeopt.backends.refuse_quantize import refuse_quantize
from moeopt.backends.tensorrt.build_engine import BuiltEngine, build_trt
from moeopt.backends.tensorrt.bundle import THROUGH_ONNX, load_trt_bundle, needs_of, save_trt_bundle
from moeopt.backends.tensorrt.engine import TensorRTEngine, built_not_executed, here
from moeopt.backends.tensorrt.engine_plan import EnginePlan, max_tokens_of, trt_plan
from moeopt.backends.tensorrt.runtime import lacking
from moeopt.backends.tensorrt.target import local_target
from moeopt.bundle.manifest import Manifest, read_manifest
from moeopt.bundle.schemas import PlanRecord
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.limits import LoadLimits
from moeopt.options import Options
from moeopt.passes.quantize_experts import BankRows
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.untrusted import checked
from moeopt.value_types import JsonValue, PyObject


class TensorRTBackend(GraphBackend):
    """An engine of TensorRT, or of TensorRT for RTX."""

    name = "tensorrt"

    def _plan_impl(self, options: Options) -> EnginePlan:
        refuse_quantize(self.name, options)
        return trt_plan(options)

    def runs_on_gpu(self, plan: EnginePlan) -> bool:
        return plan.target == local_target()

    def _run_impl(
        self, twin: nn.Module, call: ArgsKwargs, options: Options, plan: PyObject, rows: BankRows
    ) -> PipelineResult:
        plan.max_tokens = max_tokens_of(call, options)
        outcome = super()._run_impl(twin, call, options, plan, rows)
        if plan.refusals:
            refused = next((b.name for b in outcome.blocks if b.kind == "moe" and b.status == "declined"), None)
            if refused is not None:
                raise UsageError(f"{refused}: {plan.refusals[0]}")
        return outcome

    def _build_impl(self, twin: nn.Module, call: ArgsKwargs, plan: EnginePlan, options: Options) -> BuiltEngine:
        return build_trt(twin, *call, plan, options)

    def _opened_impl(self, built: BuiltEngine, plan: EnginePlan, options: Options) -> GraphEngine | OfflineEngine:
        return built.opened()

    def _lowering_impl(self, path: str, built: BuiltEngine) -> str:
        return built.lowering_of(path)

    def _graph_of(self, built: BuiltEngine) -> BuiltGraph:
        return built.graph

    def _notes_impl(self, built: BuiltEngine) -> list[str]:
        return [built.summary()]

    def _save_impl(self, made: Made, call: ArgsKwargs, directory: str | os.PathLike[str]) -> Path:
        return save_trt_bundle(made.model, made.built, directory, made.report, made.certificate, call, made.source)

    def _open_impl(
        self, directory: str | os.PathLike[str], device: PyObject, session_options: JsonValue, limits: LoadLimits
    ) -> PyObject:
        return load_trt_bundle(directory, device, session_options=session_options, limits=limits)

    def _open_to_verify_impl(self, manifest: Manifest, provider: str | None, limits: LoadLimits) -> Opened:
        """The plan where it runs, else its ONNX form on the CPU."""
        engine = load_trt_bundle(manifest.directory, provider, replay=False, limits=limits)
        if isinstance(engine, OfflineEngine):
            engine = load_trt_bundle(manifest.directory, "cpu", replay=False, limits=limits)
        executed = isinstance(engine, TensorRTEngine) or engine.provider != "cpu"
        device = engine.described if executed else built_not_executed(needs_of(manifest))
        return Opened(engine, executed, device, engine.notes)

    def facts(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Those of its graph, and what the plan runs on, its layers, its memory and the sizes that it was built for."""
        of_graph = super().facts(data)
        return {"provider": of_graph.pop("provider"), **_plan_facts(data.get("tensorrt"), data["files"]), **of_graph}

    def provider_names(self) -> tuple[str, ...]:
        return ("cuda", "cpu", *THROUGH_ONNX)

    def providers(self, directory: str | os.PathLike[str]) -> dict[str, str]:
        """The plan runs on "cuda", its ONNX form on the others."""
        needs = needs_of(read_manifest(directory))
        missing = lacking(needs, here(needs))
        others = why_absent(self.provider_names()[1:], alone=missing != "")
        return {"cuda": missing, **others}


def _plan_facts(plan: PyObject, files: Mapping[str, Any]) -> dict[str, Any]:
    checked(plan, PlanRecord, "the manifest's account of the plan")
    layers = plan.get("layers", {})
    return {
        "runs on": f"sm_{plan['sm']}, {plan['product']} {plan['version']}"
        + (f", a driver for CUDA {plan['cuda']}" if plan.get("cuda") else ""),
        "plan": f"{files.get('engine.plan', {}).get('bytes', 'no')} bytes, sha256 {plan['sha256']}",
        "flags": ", ".join(plan.get("flags", [])) or "none (no TF32)",
        "layers": f"{sum(layers.values())} ({', '.join(f'{kind} {count}' for kind, count in layers.items())})",
        "activations": f"{plan.get('activation_bytes', 0)} bytes at the largest sizes",
        "profiles": [
            f"{name} {', '.join('x'.join(map(str, shape)) for shape in shapes)}"
            for profile in plan.get("profiles", [])
            for name, shapes in profile.items()
        ],
    }
