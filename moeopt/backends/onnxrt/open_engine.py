"""Which engine answers for what was built or saved, and whether it is the engine itself or a replay of it."""

from __future__ import annotations

import os
from typing import Any

from moeopt.backends.onnxrt.build import Built
from moeopt.backends.onnxrt.bundle import load_onnx_bundle, was_replayed
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.offline_engine import AbsentEngine, built_for
from moeopt.backends.onnxrt.plan import Plan
from moeopt.backends.onnxrt.replay import ReplayPlan
from moeopt.backends.onnxrt.session import runtime
from moeopt.backends.tensorrt.bundle import load_trt_bundle, needs_of
from moeopt.backends.tensorrt.engine import TensorRTEngine, built_not_executed
from moeopt.bundle.manifest import read_manifest
from moeopt.errors import MoeoptError, NotSaveableError
from moeopt.limits import DEFAULT, LoadLimits

Answers = tuple[GraphEngine, bool, str]
"""An engine that runs here, whether it is the one that was built, and the certificate's ``device``."""


def open_onnx(built: Built, plan: Plan, session_options: Any) -> OnnxEngine | AbsentEngine:
    """What ``build_onnx`` wrote, as an engine of this machine, or of one that has the plan's provider."""
    if isinstance(plan, ReplayPlan):
        return AbsentEngine(built.directory, built.signature, plan.target.provider, built.folder)
    try:
        return OnnxEngine(built.directory, built.signature, plan.provider, session_options, keep=built.folder)
    except MoeoptError:
        raise
    except Exception as err:  # ONNX Runtime's own, of many classes
        raise NotSaveableError(
            f"ONNX Runtime {runtime().__version__} does not load the graph that was written for {plan.provider}: "
            f"{str(err).strip().splitlines()[0][:300]}; use backend='torch', or report this with the model's code"
        ) from err


def onnx_to_verify(directory: str | os.PathLike[str], provider: str | None, limits: LoadLimits = DEFAULT) -> Answers:
    """For a bundle of ONNX Runtime: on ``provider``, else where it was built for, else replayed on the CPU."""
    manifest = read_manifest(directory)
    device = provider or (None if was_replayed(manifest) else "cpu")
    engine = load_onnx_bundle(directory, device, replay=False, limits=limits)
    if isinstance(engine, AbsentEngine):
        engine = load_onnx_bundle(directory, "cpu", replay=False, limits=limits)
    assert isinstance(engine, OnnxEngine)
    executed = engine.provider != "cpu" or not was_replayed(manifest)
    return engine, executed, engine.described if executed else built_for(str(manifest.data["provider"]))


def trt_to_verify(directory: str | os.PathLike[str], provider: str | None, limits: LoadLimits = DEFAULT) -> Answers:
    """For a bundle of TensorRT: the plan where it runs, else its ONNX form on the CPU."""
    engine = load_trt_bundle(directory, provider, replay=False, limits=limits)
    if isinstance(engine, AbsentEngine):
        engine = load_trt_bundle(directory, "cpu", replay=False, limits=limits)
    assert isinstance(engine, GraphEngine)
    executed = isinstance(engine, TensorRTEngine) or engine.provider != "cpu"
    return engine, executed, engine.described if executed else built_not_executed(needs_of(read_manifest(directory)))
