"""The bundle of the ONNX Runtime backend: ``model.onnx``, its weights beside it, and what re-checks them.

model.onnx, model.onnx.data   plain ONNX Runtime runs them; inputs are named as the model's arguments
model.native.onnx             the same graph with moeopt's own operator for the experts of blocks that it computes
                              faster, over the same weights; it runs where the operator is there and answers rightly
signature.json                how it is called, and which names those are
probes.safetensors            one question, with its answer in float64, for each kind of lowered block
fallback.onnx, fallback.onnx.data, fallback.probes.safetensors   the same engine lowered for CPU, where it was built
                              for a provider that was not there: what was verified, and what is replayed elsewhere
certificate.json, golden.safetensors, moeopt.json   as in every bundle
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moeopt.backends.onnxrt import known_answer as probes
from moeopt.backends.onnxrt.bundle_files import CERTIFICATE, ONNX_FILE, SIGNATURE, probes_of
from moeopt.backends.onnxrt.check_bytes import check_graph, parsed
from moeopt.backends.onnxrt.custom_op import native_library, register, why_not
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.fallback_graph import FALLBACK, FALLBACKS, fallback_among
from moeopt.backends.onnxrt.offline_engine import OfflineEngine
from moeopt.backends.onnxrt.process_variables import check_variables_of
from moeopt.backends.onnxrt.providers import PROVIDERS, available, provider_named, runtime
from moeopt.backends.onnxrt.rounded_activations import KEY, RoundingDeclined, check_operator, with_float_activations
from moeopt.backends.onnxrt.selftest import SelfTestResult, load_probes, self_test, wrong_answers
from moeopt.backends.onnxrt.session import GRAPH, NATIVE, data_of
from moeopt.backends.onnxrt.trial import check_calls, within_limits
from moeopt.bundle import golden as goldens
from moeopt.bundle.manifest import Manifest, read_manifest
from moeopt.bundle.resident import check_resident
from moeopt.bundle.schemas import Form, SignatureFile
from moeopt.errors import (
    BundleError,
    EngineFallbackWarning,
    EngineNotExecutableError,
    LimitError,
    NotEquivalentError,
    UsageError,
)
from moeopt.limits import DEFAULT, LoadLimits
from moeopt.untrusted import checked
from moeopt.value_types import JsonValue, OnnxModel, PyObject

_PASSED: set[tuple[str, ...]] = set()
"""Bundles that this process tested: sha256 of graph and weights, version of ONNX Runtime, provider."""


def load_onnx_bundle(
    directory: str | os.PathLike[str],
    device: PyObject = None,
    *,
    replay: bool = True,
    session_options: JsonValue = None,
    limits: LoadLimits = DEFAULT,
    resident: bool = False,
) -> OnnxEngine | OfflineEngine:
    """Check a bundle, test it on this machine, and load it.

    Args:
        directory: the bundle.
        device: where it shall run, like ``"cuda"`` or a provider's name; None means what it was built for. A bundle
            that was built and not executed runs its CPU fallback graph on ``"cpu"``; where what it was built for is not
            there, None gives an engine that says so when it is called.
        replay: run the golden inputs too; ``moeopt.verify`` runs them itself.
        session_options: an ``onnxruntime.SessionOptions``.
        limits: what the self-test and the golden runs may take.
        resident: whether :meth:`OnnxEngine.keep_resident` will be asked of it, which is refused before the graph is
            read.

    Raises:
        BundleError: it is damaged, hostile or from a newer moeopt; the message names the file and the reason. A
            ``LimitError`` where it takes more than ``limits``.
        UsageError: the provider is not on this machine; a variable of this process changes what its kernels compute.
        EngineNotExecutableError: a block computes something else here, and no other lowering takes its place.
        NotEquivalentError: the golden runs come back otherwise than the engine was verified to give them.
    """
    manifest = read_manifest(directory)
    if manifest.backend != "onnxruntime":
        raise BundleError(f"{manifest.directory}: it is a bundle for {manifest.backend}: use moeopt.load")
    provider = _provider(manifest, device)
    if resident:
        check_resident(directory, provider)
    for name in (GRAPH, probes.FILE, goldens.FILE, CERTIFICATE):  # also where this process tested the same graph before
        manifest.path(name)
    signature = read_signature(manifest)
    fallback = fallback_among(manifest.data["files"]) or FALLBACK
    graph = fallback if was_replayed(manifest) and provider == "cpu" else GRAPH
    proto = _checked(manifest, graph, signature)
    check_variables_of(manifest.directory, manifest.data, proto)
    if provider not in available():
        _checked(manifest, fallback, signature)
        return OfflineEngine(manifest.directory, signature, provider, manifest=manifest)
    load = functools.partial(_loaded, manifest, signature, provider, session_options, limits, replay)
    if not holds_native(manifest.data):
        return load(graph, proto)
    native = _checked(manifest, NATIVE, signature)  # damage is told wherever the bundle is loaded
    if graph != GRAPH or provider != "cpu":
        return load(graph, proto)
    return _native_or_plain(manifest, load, native, proto)


Load = Callable[[str, Any], OnnxEngine]


def says_int8(data: Mapping[str, Any]) -> bool:
    """Whether the manifest says that products of codes round what they read."""
    return data.get(KEY) == "int8"


def holds_native(data: Mapping[str, Any]) -> bool:
    """Whether the manifest speaks of a graph with moeopt's own operator."""
    return data.get("native") is not None


def _native_or_plain(manifest: Manifest, load: Load, native: PyObject, plain: PyObject) -> OnnxEngine:
    """The engine with moeopt's own operator where that is there and right, else of plain ONNX Runtime, with a note."""
    if reason := why_not() or _rounds_wrongly(manifest):
        engine = load(GRAPH, plain)
        engine.notes.append(f"{GRAPH} runs, not {NATIVE}: {reason}")
        return engine
    try:
        engine = load(NATIVE, native)
    except LimitError:
        raise
    except (EngineNotExecutableError, NotEquivalentError) as err:
        engine = load(GRAPH, plain)
        note = f"{GRAPH} runs, not {NATIVE}: {err}"
        warnings.warn(note, EngineFallbackWarning, stacklevel=4)
        engine.notes.append(note)
        return engine
    engine.notes.append(native_note(manifest.data["native"]))
    return engine


def _rounds_wrongly(manifest: Manifest) -> str:
    """Why moeopt's operator does not round rows here as the bundle says; "" where it does, or nothing is rounded."""
    if not says_int8(manifest.data):
        return ""
    try:
        check_operator(manifest.directory)
    except RoundingDeclined as err:
        return str(err)
    return ""


def native_note(native: Mapping[str, Any]) -> str:
    """A sentence on an engine whose experts moeopt's own operator computes."""
    library = native_library()
    count = len(native["blocks"])
    return (
        f"the experts of {count} block{'s' if count != 1 else ''} run in moeopt's native kernel "
        f"({library.isa if library is not None else 'none here'}, {NATIVE}); where it is absent, {GRAPH} runs"
    )


def _loaded(
    manifest: Manifest,
    signature: Mapping[str, Any],
    provider: str,
    session_options: JsonValue,
    limits: LoadLimits,
    replay: bool,
    graph: str,
    proto: OnnxModel,
) -> OnnxEngine:
    """One graph of a bundle, tested on this machine, as an engine."""
    if says_int8(manifest.data):  # blocks are asked what they were verified to answer
        proto = with_float_activations(proto)
    key = (*(str(manifest.data["files"].get(f)) for f in (graph, data_of(graph))), runtime().__version__, provider)
    outcome = SelfTestResult(manifest.directory, graph)
    if key not in _PASSED:
        within_limits(manifest, proto, graph, signature, limits)

        def check(part: bytes, feeds: Mapping[str, torch.Tensor]) -> None:
            where = f"{manifest.path(graph)}, a block"
            check_calls(parsed(part), part, manifest.directory, [feeds], limits, manifest.bytes, where)

        seconds = limits.seconds_for(manifest.bytes)
        records, probes = _probes(manifest, graph)
        if graph == NATIVE:
            wrong = wrong_answers(manifest.directory, proto, records, probes, provider, check, seconds, register)
            if wrong:
                raise EngineNotExecutableError(f"a block fails its self-test ({next(iter(wrong.values()))})")
        else:
            outcome = self_test(manifest.directory, proto, records, probes, provider, graph, check, seconds)
    engine = _open(manifest, outcome, signature, provider, session_options)
    if replay and key not in _PASSED:
        came_back = replay_golden(engine, limits)
        if came_back.passed is False:
            raise NotEquivalentError(
                f"{manifest.directory}: on {provider} the engine does not give what it was verified to give: "
                f"{came_back.reason}. Save the bundle again on this machine, or run it where it was verified"
            )
        if not outcome.notes:
            _PASSED.add(key)
    return engine


def read_signature(manifest: Manifest) -> dict[str, Any]:
    """How the graph of a bundle is called."""
    signature, where = manifest.read_json(SIGNATURE), manifest.path(SIGNATURE)
    if not isinstance(signature, dict):
        raise BundleError(f"{where}: it describes no call")
    if isinstance(signature.get("inputs"), list):  # else the check of the graph's ends says it
        checked(signature, SignatureFile, str(where))
    return signature


def was_replayed(manifest: Manifest) -> bool:
    """Whether the bundle was built on a machine without its provider, and its certificate speaks of a replay."""
    return "portable" in manifest.data


def _checked(manifest: Manifest, graph: str, signature: Mapping[str, Any]) -> PyObject:
    if graph in FALLBACKS and not isinstance(manifest.data["portable"], dict):
        raise BundleError(f"{manifest.directory}: the manifest does not describe {graph}")
    if graph in FALLBACKS:
        checked(manifest.data["portable"], Form, f"{manifest.directory}: what the manifest says of {graph}")
    size = manifest.data["files"].get(data_of(graph), {"bytes": 0})["bytes"]
    source = manifest.data.get("source")
    of_file = isinstance(source, dict) and source.get("kind") == ONNX_FILE
    rounds = says_int8(manifest.data)
    return check_graph(manifest.path(graph), signature, size, rounds, of_file=of_file)


def replay_golden(engine: GraphEngine, limits: LoadLimits = DEFAULT) -> goldens.GoldenCheck:
    """Run the golden inputs of a loaded engine again and compare with what its manifest allows.

    ``LimitError`` where they take longer than ``limits`` say.
    """
    manifest = engine.manifest
    assert manifest is not None, "only a loaded engine has golden runs"
    path = manifest.path(goldens.FILE)
    runs = goldens.load_golden(path, torch.device("cpu"))
    distance = goldens.read_stated(manifest.data.get("golden"), len(runs), str(manifest.directory))

    def run(leaves: PyObject) -> PyObject:
        try:
            result = engine.run_flat(leaves)
        except (LimitError, BundleError):
            raise
        except Exception as err:  # the runtime's own, of many classes
            raise RuntimeError(str(err).strip().partition("\n")[0][:300]) from None
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cpu(), result)

    with engine.within(limits.seconds_for(manifest.bytes)):
        return goldens.check_golden(run, runs, distance, engine.states)


def _open(
    manifest: Manifest, outcome: SelfTestResult, signature: Mapping[str, Any], provider: str, session_options: JsonValue
) -> OnnxEngine:
    try:
        return OnnxEngine(
            outcome.directory, signature, provider, session_options, outcome.folder, manifest, outcome.notes,
            outcome.graph,
        )  # fmt: skip
    except BundleError as err:
        raise BundleError(f"{manifest.path(SIGNATURE)}: {err}") from None
    except (UsageError, EngineNotExecutableError):
        raise
    except Exception as err:  # ONNX Runtime's own, of many classes
        lines = str(err).strip().splitlines()
        reason = f"ONNX Runtime does not load it on {provider}: {lines[0][:300] if lines else type(err).__name__}"
        if provider == manifest.data.get("provider") and outcome.graph != NATIVE:
            raise BundleError(f"{manifest.path(outcome.graph)}: {reason}") from None
        raise EngineNotExecutableError(
            f"{manifest.path(outcome.graph)}: {reason}. It was verified on {manifest.data.get('provider')}: run it "
            f"there, or optimise the model again for {provider}"
        ) from None


def _provider(manifest: Manifest, device: PyObject) -> str:
    there = available()
    saved = manifest.data.get("provider")
    if not isinstance(saved, str):
        raise BundleError(f"{manifest.directory}: the manifest names no provider")
    if saved not in PROVIDERS:
        raise BundleError(f"{manifest.directory}: it was built for {saved!r:.60}, not one of {', '.join(PROVIDERS)}")
    wanted = provider_named(saved if device is None else str(device))
    if wanted not in there and not (device is None and was_replayed(manifest)):
        hint = "" if device is not None else "; it was saved there: name another, like device='cpu'"
        raise UsageError(f"provider {wanted!r} is not on this machine; it has: {', '.join(there)}{hint}")
    return wanted


def _probes(manifest: Manifest, graph: str) -> tuple[list[Any], list[Any]]:
    form = manifest.data["portable"] if graph in FALLBACKS else manifest.data
    records, budgets = form.get("sites"), form.get("probes")
    if not isinstance(records, list) or not isinstance(budgets, list) or not all(isinstance(r, dict) for r in records):
        raise BundleError(f"{manifest.directory}: the manifest has no records of the lowered blocks")
    return records, load_probes(manifest.path(probes_of(graph)), budgets)
