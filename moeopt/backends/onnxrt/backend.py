"""The ONNX Runtime backend: the whole model as one graph, for CPU, CUDA and whatever provider it lists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moeopt.backends.base import Made, Opened
from moeopt.backends.onnxrt.build import BuiltGraph, build_onnx, onnx_plan
from moeopt.backends.onnxrt.bundle import holds_native, load_onnx_bundle, native_note, was_replayed
from moeopt.backends.onnxrt.custom_op import why_not
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.graph_backend import GraphBackend
from moeopt.backends.onnxrt.lowerings.quantized import UnrolledBytes, UnrolledFloats
from moeopt.backends.onnxrt.offline_engine import OfflineEngine, built_for
from moeopt.backends.onnxrt.open_engine import chosen_options, open_onnx
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.providers import PROVIDERS, why_absent
from moeopt.backends.onnxrt.save_bundle import save_onnx_bundle
from moeopt.backends.onnxrt.session import GRAPH, NATIVE, VERIFIED, data_of, mapped_options
from moeopt.bundle.manifest import Manifest
from moeopt.capture.tree import ArgsKwargs
from moeopt.limits import LoadLimits
from moeopt.listed import listed
from moeopt.onnx_in.read import read_onnx
from moeopt.options import Options
from moeopt.value_types import JsonValue, PyObject
from moeopt.verification.certificate import Certificate

_NOTES = {
    UnrolledFloats.name: (
        "ONNX Runtime has no quick kernel that computes on these codes with float32 activations, so the file holds "
        "codes, and a session makes floats of them when it is loaded; integers of 4 bits in blocks stay codes in "
        "memory too, and so do those of 8 bits with mapped=True, more slowly"
    ),
    UnrolledBytes.name: (
        "as mapped=True or activations='int8' asks, a session holds these codes and no floats; ONNX Runtime's product "
        "of 8-bit codes with float32 activations makes one matrix float at each call, which takes about 10 times as "
        "long for one token"
    ),
}
"""What reports say of experts in these forms."""
_READ_AS_CODES = (
    "the file holds codes, and moeopt's native kernel computes on them as they lie there; where it is absent, a "
    "session of model.onnx makes floats of them when it is loaded"
)
"""The same of those whose plain form is :class:`UnrolledFloats`, where the native kernel takes its place."""

MOST_PACKED = 1 << 30
"""Bytes of weights from which the graph that runs where moeopt's operator is not is compared without packed copies."""
_IN_PLACE = (
    f"{GRAPH} was compared with its weights read where they lie in the file, as a session that packs copies of them "
    "would take as much memory again; one that does rounds in another order"
)


class OnnxRuntimeBackend(GraphBackend):
    """An engine in sessions of ONNX Runtime."""

    name = "onnxruntime"

    def _plan_impl(self, options: Options) -> OrtPlan:
        return onnx_plan(options)

    def runs_on_gpu(self, plan: OrtPlan) -> bool:
        return plan.provider != "cpu"

    def optimize_file(
        self, model: PyObject, inputs: PyObject, options: Options, plan: PyObject
    ) -> tuple[Made, ArgsKwargs]:
        from moeopt.backends.onnxrt.onnx_file.optimize import (
            optimize_file,  # it needs onnx, which models may do without
        )

        return optimize_file(read_onnx(model), inputs, options, plan, type(self))

    def verify_file(self, original: PyObject, inputs: PyObject, engine: PyObject, before: Certificate) -> Certificate:
        from moeopt.backends.onnxrt.onnx_file.optimize import verify_file  # it needs onnx, which models may do without

        return verify_file(read_onnx(original), inputs, engine, before)

    def _build_impl(self, twin: nn.Module, call: ArgsKwargs, plan: OrtPlan, options: Options) -> BuiltGraph:
        return build_onnx(twin, *call, plan, options.say)

    def _opened_impl(self, built: BuiltGraph, plan: OrtPlan, options: Options) -> GraphEngine | OfflineEngine:
        mapped = options.mapped or _compared_in_place(built)
        return open_onnx(built, plan, chosen_options(mapped, options.session_options))

    def _native_impl(self, built: BuiltGraph, plan: OrtPlan, options: Options) -> OnnxEngine:
        engine = open_onnx(built, plan, chosen_options(options.mapped, options.session_options), NATIVE)
        assert isinstance(engine, OnnxEngine), "a plan with native blocks runs on this machine"
        return engine

    def _notes_impl(self, built: BuiltGraph) -> list[str]:
        """Which quantised experts are codes in the file and floats in memory, and which stay codes, which is slower."""
        lowered = [*built.lowerings.items(), *built.products.items()]
        found = {form: [path for path, name in lowered if name == form] for form in _NOTES}
        if (built.directory / VERIFIED).exists():  # 8 bits are quick where activations are rounded
            del found[UnrolledBytes.name]
        native = set(built.native.get("blocks", ()))
        said = [(_READ_AS_CODES, [site for site in found[UnrolledFloats.name] if site in native])]
        found[UnrolledFloats.name] = [site for site in found[UnrolledFloats.name] if site not in native]
        said += [(_NOTES[form], sites) for form, sites in found.items()]
        notes = [f"{listed(sites, most=1)}: {words}" for words, sites in said if sites]
        return [*notes, _IN_PLACE] if _compared_in_place(built) else notes

    def _lowering_impl(self, path: str, built: BuiltGraph) -> str:
        found = {why for site, why in built.reasons.items() if site.split("#")[0] == path}
        return "onnxruntime " + "; ".join(sorted(found)) if found else ""

    def _save_impl(self, made: Made, call: ArgsKwargs, directory: str | os.PathLike[str]) -> Path:
        return save_onnx_bundle(made.model, made.built, directory, made.report, made.certificate, call, made.source)

    def _open_impl(
        self, directory: str | os.PathLike[str], device: PyObject, session_options: JsonValue, limits: LoadLimits
    ) -> PyObject:
        return load_onnx_bundle(directory, device, session_options=session_options, limits=limits)

    def _open_to_verify_impl(self, manifest: Manifest, provider: str | None, limits: LoadLimits) -> Opened:
        """On ``provider``, else where the bundle was built for, else replayed on the CPU."""
        replayed = was_replayed(manifest)
        engine = load_onnx_bundle(
            manifest.directory, provider or (None if replayed else "cpu"), replay=False, limits=limits
        )
        if isinstance(engine, OfflineEngine):
            engine = load_onnx_bundle(manifest.directory, "cpu", replay=False, limits=limits)
        executed = engine.provider != "cpu" or not replayed
        device = engine.described if executed else built_for(str(manifest.data["provider"]))
        return Opened(engine, executed, device, engine.notes)

    def _open_mapped_impl(
        self, directory: str | os.PathLike[str], device: PyObject, session_options: JsonValue,
        limits: LoadLimits, resident: int | None,
    ) -> PyObject:  # fmt: skip
        engine = load_onnx_bundle(
            directory, device, session_options=mapped_options(session_options), limits=limits,
            resident=resident is not None,
        )  # fmt: skip
        if resident is not None and isinstance(engine, OnnxEngine):
            engine.keep_resident(resident)
        return engine

    def facts(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Also where its experts run on this machine."""
        found = super().facts(data)
        if holds_native(data):
            reason = why_not()
            found["runs"] = f"{GRAPH}, not {NATIVE}: {reason}" if reason else native_note(data["native"])
            found["lowerings"] = [f"{lowering}, in {GRAPH}" for lowering in found["lowerings"]]
        return found

    def provider_names(self) -> tuple[str, ...]:
        return tuple(PROVIDERS)

    def providers(self, directory: str | os.PathLike[str]) -> dict[str, str]:
        return why_absent(self.provider_names())


def _compared_in_place(built: BuiltGraph) -> bool:
    """Whether the plain graph is large, and is compared only: moeopt's own operator runs here."""
    data = built.directory / data_of(GRAPH)
    return bool(built.native) and data.exists() and data.stat().st_size >= MOST_PACKED
