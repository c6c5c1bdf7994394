"""The bundle of the TensorRT backend: the plan, the ONNX form that it was built from, and what re-checks them.

engine.plan                         what TensorRT runs, for one compute capability and one version of TensorRT
layers.json                         its layers after all fusions, and the ONNX nodes that each computes
model.onnx, model.onnx.data         what it was built from
fallback.onnx, fallback.onnx.data   the same for ONNX Runtime's CPU, where that cannot run model.onnx
signature.json, certificate.json, golden.safetensors, moeopt.json   as in every bundle
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.backends.onnxrt.bundle import read_signature, replay_golden
from moeopt.backends.onnxrt.bundle_files import CERTIFICATE, SIGNATURE, golden_calls
from moeopt.backends.onnxrt.check_bytes import check_graph
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.fallback_graph import FALLBACK, FALLBACKS
from moeopt.backends.onnxrt.golden import budget_of, golden_runs
from moeopt.backends.onnxrt.providers import available, provider_named, runtime
from moeopt.backends.onnxrt.save_bundle import stated, write_evidence
from moeopt.backends.onnxrt.session import GRAPH, data_of
from moeopt.backends.onnxrt.trial import within_limits
from moeopt.backends.tensorrt.build_engine import BuiltEngine
from moeopt.backends.tensorrt.engine import (
    PLAN,
    OfflineTensorRTEngine,
    TensorRTEngine,
    here,
    inside,
    onnx_form,
    provider_of,
)
from moeopt.backends.tensorrt.layers import counted
from moeopt.backends.tensorrt.product import LABELS
from moeopt.backends.tensorrt.runtime import Needs, lacking
from moeopt.bundle import golden as goldens
from moeopt.bundle.manifest import Manifest, read_manifest, write_bundle
from moeopt.errors import BundleError, EngineNotExecutableError, NotEquivalentError, UsageError
from moeopt.limits import DEFAULT, LoadLimits
from moeopt.report import Report
from moeopt.value_types import JsonValue, PyObject

LAYERS = "layers.json"
THROUGH_ONNX = ("nv_tensorrt_rtx", "tensorrt")
"""Providers of ONNX Runtime that run ``model.onnx`` itself."""
_PASSED: set[tuple[str, ...]] = set()
"""Bundles whose golden runs came back in this process: sha256 of the form and its weights, what ran it."""


def save_trt_bundle(
    engine: TensorRTEngine | OfflineTensorRTEngine,
    built: BuiltEngine,
    directory: str | os.PathLike[str],
    report: Report,
    certificate: PyObject,
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    source: Mapping[str, str] | None,
) -> Path:
    """Write an engine as a bundle; returns its directory. Errors are those of ``save_torch_bundle``."""
    if not (built.directory / PLAN).is_file():
        raise UsageError(f"the engine's files in {built.directory} are gone: optimise the model again, then save it")
    distance, why = budget_of(certificate)
    runner = engine.replay() if isinstance(engine, OfflineTensorRTEngine) else engine
    calls = [c for c in golden_calls(runner, call) if inside(built.plan.profiles, runner.signature, c)]
    runs = golden_runs(runner, calls, distance)
    signature = built.graph.signature
    fields = {
        "provider": provider_of(built.needs),
        "runtimes": {built.needs.product: built.needs.version, "onnxruntime": runtime().__version__},
        **stated(signature, report, source),
        "lowerings": built.graph.lowerings,
        "sites": built.graph.sites,
        "facts": built.graph.facts,
        "tensorrt": _described(built),
        "golden": {"runs": len(runs), "distance": distance, "why": why},
    }

    def write(aside: Path) -> None:
        for name in (PLAN, *(f for g in (GRAPH, FALLBACK) for f in (g, data_of(g)))):
            if (built.directory / name).exists():
                shutil.copyfile(built.directory / name, aside / name)
        (aside / LAYERS).write_text(json.dumps([dataclasses.asdict(layer) for layer in built.plan.layers]))
        write_evidence(aside, signature, certificate, runs)

    return write_bundle(directory, "tensorrt", write, fields)


def _described(built: BuiltEngine) -> dict[str, Any]:
    """What a manifest says of the plan."""
    plan = built.plan
    return {
        **dataclasses.asdict(built.needs),
        "sha256": plan.sha256,
        "flags": list(plan.flags),
        "profiles": [{name: [list(s) for s in shapes] for name, shapes in p.items()} for p in plan.profiles],
        "inputs": list(plan.inputs),
        "outputs": list(plan.outputs),
        "layers": counted(plan.layers),
        "activation_bytes": plan.activation_bytes,
        "weights_bytes": plan.weights_bytes,
    }


def load_trt_bundle(
    directory: str | os.PathLike[str],
    device: PyObject = None,
    *,
    replay: bool = True,
    session_options: JsonValue = None,
    limits: LoadLimits = DEFAULT,
) -> GraphEngine | OfflineTensorRTEngine:
    """Check a bundle and load it.

    Args:
        directory: the bundle.
        device: None: the plan, on a machine that runs it; elsewhere an engine that says so when it is called.
            "cuda": the plan, or an error. "cpu": its ONNX form in ONNX Runtime. "nv_tensorrt_rtx", "tensorrt": its
            ONNX form through that provider of ONNX Runtime.
        replay: run the golden inputs too.
        session_options: an ``onnxruntime.SessionOptions``, for the ONNX form.
        limits: what the golden runs of the ONNX form may take.

    Raises:
        BundleError: it is damaged, hostile or from a newer moeopt; the message names the file and the reason.
        UsageError: the provider is not on this machine.
        EngineNotExecutableError: the plan was asked for and does not run here, or TensorRT refuses it.
        NotEquivalentError: the golden runs come back otherwise than the engine was verified to give them.
    """
    manifest = read_manifest(directory)
    if manifest.backend != "tensorrt":
        raise BundleError(f"{manifest.directory}: it is a bundle for {manifest.backend}: use moeopt.load")
    needs, profiles = _read_needs(manifest)
    signature = read_signature(manifest)
    for name in (PLAN, GRAPH, goldens.FILE, CERTIFICATE):
        manifest.path(name)
    protos = {}
    for graph in (GRAPH, *FALLBACKS):
        if graph in manifest.data["files"]:
            size = manifest.data["files"].get(data_of(graph), {"bytes": 0})["bytes"]
            protos[graph] = check_graph(manifest.path(graph), signature, size)
    engine: GraphEngine
    name = "" if device is None else str(device).split(":")[0].lower()
    if name in ("", "cuda"):
        if missing := lacking(needs, here(needs)):
            if name == "cuda":
                raise EngineNotExecutableError(f"{manifest.directory}: the engine does not run here: {missing}")
            return OfflineTensorRTEngine(manifest.directory, signature, needs, manifest=manifest)
        engine = TensorRTEngine(manifest.directory, signature, needs, profiles, manifest=manifest)
    else:
        if provider_named(name) == "cpu":
            graph = onnx_form(manifest.data["files"])
            within_limits(manifest, protos[graph], graph, signature, limits)
        engine = _onnx_engine(manifest, signature, name, session_options)
    form = PLAN if isinstance(engine, TensorRTEngine) else onnx_form(manifest.data["files"])
    if replay:
        _replay(engine, manifest, form, limits)
    return engine


def _replay(engine: GraphEngine, manifest: Manifest, form: str, limits: LoadLimits) -> None:
    """Run the golden inputs, once in a process for each file and provider; ``NotEquivalentError`` where they differ."""
    key = (*(str(manifest.data["files"].get(f)) for f in (form, data_of(form))), engine.provider)
    if key in _PASSED:
        return
    check = replay_golden(engine, limits)
    if check.passed is False:
        raise NotEquivalentError(
            f"{manifest.directory}: on {engine.provider} the engine does not give what it was verified to give: "
            f"{check.reason}. Optimise the model again on this machine, or run the bundle where it was verified"
        )
    _PASSED.add(key)


def needs_of(manifest: Manifest) -> Needs:
    """What the plan of a bundle runs on; ``BundleError`` where the manifest does not say it."""
    return _read_needs(manifest)[0]


def _onnx_engine(manifest: Manifest, signature: Mapping[str, Any], name: str, session_options: JsonValue) -> OnnxEngine:
    provider, there = provider_named(name), available()
    if provider not in there or provider not in ("cpu", *THROUGH_ONNX):
        raise UsageError(
            f"provider {provider!r} is not on this machine; it has: {', '.join(there)}; a bundle for TensorRT runs on "
            f"'cuda' as it was built, and its ONNX form on 'cpu', {' or '.join(map(repr, THROUGH_ONNX))}"
        )
    graph = onnx_form(manifest.data["files"]) if provider == "cpu" else GRAPH
    try:
        return OnnxEngine(manifest.directory, signature, provider, session_options, None, manifest, (), graph)
    except BundleError as err:
        raise BundleError(f"{manifest.path(SIGNATURE)}: {err}") from None
    except (UsageError, EngineNotExecutableError):
        raise
    except Exception as err:  # ONNX Runtime's own, of many classes
        lines = str(err).strip().splitlines()
        reason = lines[0][:300] if lines else type(err).__name__
        raise BundleError(f"{manifest.path(graph)}: ONNX Runtime does not load it on {provider}: {reason}") from None


def _read_needs(manifest: Manifest) -> tuple[Needs, list[dict[str, Any]]]:
    said = manifest.data.get("tensorrt")
    try:
        needs = Needs(*(said[key] for key in ("product", "version", "sm", "cuda")))  # type: ignore[index]
        profiles = [{str(n): _shapes(shapes) for n, shapes in p.items()} for p in said["profiles"]]  # type: ignore[index]
        good = needs.product in LABELS and isinstance(needs.version, str) and isinstance(needs.sm, int)
        good = good and (needs.cuda is None or isinstance(needs.cuda, int))
    except (TypeError, KeyError, ValueError, AttributeError):
        good = False
    if not good:
        raise BundleError(f"{manifest.directory}: the manifest does not say what {PLAN} runs on")
    if said.get("sha256") != manifest.data["files"].get(PLAN, {}).get("sha256"):  # type: ignore[union-attr]
        raise BundleError(f"{manifest.directory}: {PLAN} is not the one that the manifest describes")
    return needs, profiles


def _shapes(shapes: PyObject) -> tuple[tuple[int, ...], ...]:
    three = tuple(tuple(int(size) for size in shape) for shape in shapes)
    if len(three) != 3:
        raise ValueError("a profile has three shapes")
    return three
