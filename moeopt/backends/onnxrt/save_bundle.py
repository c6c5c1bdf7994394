"""Writing an ONNX bundle: graphs, weights, probes, golden runs, certificate and manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moeopt.backends.onnxrt.build import BuiltGraph
from moeopt.backends.onnxrt.bundle_files import CERTIFICATE, SIGNATURE, golden_calls, probes_of
from moeopt.backends.onnxrt.check_bytes import parse
from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.backends.onnxrt.fallback_graph import FALLBACK
from moeopt.backends.onnxrt.golden import budget_of, golden_runs
from moeopt.backends.onnxrt.offline_engine import OfflineEngine
from moeopt.backends.onnxrt.process_variables import KEY as KEY_OF_VARIABLES
from moeopt.backends.onnxrt.process_variables import check_variables
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.rounded_activations import KEY as ROUNDED
from moeopt.backends.onnxrt.session import GRAPH, NATIVE, data_of
from moeopt.bundle import golden as goldens
from moeopt.bundle.holds import sentences
from moeopt.bundle.io_names import KEY
from moeopt.bundle.manifest import write_bundle
from moeopt.causal_lm.companions import write_companions
from moeopt.causal_lm.genai import why_not_genai, write_genai
from moeopt.errors import UsageError
from moeopt.report import Report
from moeopt.value_types import PyObject


def save_onnx_bundle(
    engine: OnnxEngine | OfflineEngine,
    built: BuiltGraph,
    directory: str | os.PathLike[str],
    report: Report,
    certificate: PyObject,
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    source: Mapping[str, str] | None,
) -> Path:
    """Write an engine as a bundle; returns its directory. Errors are those of ``save_torch_bundle``."""
    if not (built.directory / GRAPH).is_file():
        raise UsageError(f"the engine's files in {built.directory} are gone: optimise the model again, then save it")
    distance, why = budget_of(certificate)
    runner = engine.replay() if isinstance(engine, OfflineEngine) else engine
    runs = golden_runs(runner, golden_calls(runner, call), distance)
    fields = {
        "provider": engine.provider,
        "runtimes": _runtimes(),
        **_form(built),
        **stated(built.signature, report, source),
        "golden": {"runs": len(runs), "distance": distance, "why": why},
    }
    if built.cpu_fallback is not None:
        fields["portable"] = _form(built.cpu_fallback)
    if built.native:
        fields["native"] = built.native
    if certificate.activations:
        fields[ROUNDED] = "int8"
    check_variables(built.variables, parse(built.directory / GRAPH), "this engine")
    if built.variables:
        fields[KEY_OF_VARIABLES] = built.variables

    def write(aside: Path) -> None:
        _write_form(built, GRAPH, aside)
        if built.cpu_fallback is not None:
            _write_form(built.cpu_fallback, FALLBACK, aside)
        if built.native:
            shutil.copyfile(built.directory / NATIVE, aside / NATIVE)
        runs_in = _for_other_runtimes(built.signature, engine.provider, aside)
        write_evidence(aside, built.signature, certificate, runs, runs_in)

    return write_bundle(directory, "onnxruntime", write, fields)


def stated(signature: Mapping[str, Any], report: Report, source: Mapping[str, str] | None) -> dict[str, Any]:
    """What the manifest of every engine says of its model, its call and its blocks."""
    return {
        "source": dict(source or {}),
        "signature": {k: signature[k] for k in ("parameters", "in_tree", "out_tree", "inputs")},
        "dynamic": signature["sizes"],
        "holds": sentences(signature),
        "blocks": report.to_dict()["blocks"],
    }


def write_evidence(
    aside: Path,
    signature: Mapping[str, Any],
    certificate: PyObject,
    runs: PyObject,
    runs_in: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The files that every engine's bundle has beside its graphs.

    Args:
        runs_in: other runtimes that a language model's engine may run in -> "", or why it does not.
    """
    if KEY in signature:
        write_companions(aside, signature[KEY], runs_in)
    (aside / SIGNATURE).write_text(json.dumps(signature, allow_nan=False))
    (aside / CERTIFICATE).write_text(certificate.to_json())
    goldens.save_golden(runs, aside / goldens.FILE)


def _for_other_runtimes(signature: Mapping[str, Any], provider: str, aside: Path) -> dict[str, str]:
    """Write what other runtimes need to drive a language model's engine; "" for each that can, else why not."""
    if KEY not in signature:
        return {}
    why_not = why_not_genai(signature[KEY])
    if not why_not:
        write_genai(aside, GRAPH, signature[KEY], provider)
    return {"ONNX Runtime GenAI": why_not}


def _form(built: BuiltGraph) -> dict[str, Any]:
    """What a manifest says of one lowered graph."""
    return {
        "lowerings": built.lowerings,
        "sites": built.sites,
        "probes": [{"budget": budget} for _, budget in built.probes],
        "facts": built.facts,
    }


def _write_form(built: BuiltGraph, graph: str, aside: Path) -> None:
    from safetensors.torch import save_file

    for name in (graph, data_of(graph)):
        if (built.directory / name).exists():
            shutil.copyfile(built.directory / name, aside / name)  # a second name would keep onnx from reading it
    tensors = {f"{n}.{part}": t.contiguous() for n, (probe, _) in enumerate(built.probes) for part, t in probe.items()}
    save_file(tensors, aside / probes_of(graph))


def _runtimes() -> dict[str, str]:
    from importlib import metadata

    names = ("onnx", "onnx_ir", "onnxscript")
    return {"onnxruntime": runtime().__version__, **{name: metadata.version(name) for name in names}}
