"""The bundle of the torch backend: a graph in JSON, its weights in safetensors, and no pickle anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import moeopt.ops  # noqa: F401  registers moeopt::experts and moeopt::route, which graphs call
from moeopt.bundle import golden as goldens
from moeopt.bundle.aligned import aligned
from moeopt.bundle.engine import Engine
from moeopt.bundle.graph import write_graph
from moeopt.bundle.holds import notes_on_sizes, sentences
from moeopt.bundle.manifest import Manifest, read_manifest, write_bundle
from moeopt.bundle.resident import Residency, ResidentExperts, check_resident
from moeopt.bundle.runner import GraphRunner
from moeopt.bundle.tree import build
from moeopt.bundle.weights import pack, unpack
from moeopt.bundle.weights_file import save_weights
from moeopt.errors import BundleError, NotSaveableError, UsageError
from moeopt.limits import DEFAULT, LoadLimits, TimeLimit
from moeopt.lower.signature import size_conditions
from moeopt.report import Report
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate

GRAPH, WEIGHTS, CERTIFICATE = "graph.json", "weights.safetensors", "certificate.json"


def save_torch_bundle(
    program: torch.export.ExportedProgram,
    directory: str | os.PathLike[str],
    *,
    report: Report,
    certificate: PyObject,
    golden_inputs: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]] = (),
    golden_outputs: Sequence[Any] = (),
    golden_distance: float | None = None,
    golden_edges: Sequence[Mapping[int, torch.Tensor]] = (),
    source: Mapping[str, str] | None = None,
) -> Path:
    """Write an exported program as a bundle; returns its directory.

    Args:
        program: the optimised model, exported by ``torch.export.export``.
        directory: a new path, an empty directory, or a bundle to replace.
        report: which blocks were rewritten and how they are lowered.
        certificate: anything with ``to_json()``.
        golden_inputs: ``(args, kwargs)`` of each golden run.
        golden_outputs: what the optimised model returned for each.
        golden_distance: the relative L2 distance per token that another machine may differ by; None is 8 eps.
        golden_edges: of each golden run, ``Golden.edges``; none where they were not measured.
        source: what :func:`moeopt.bundle.fingerprint` said of the original model.

    Raises:
        NotSaveableError: names the op, weight or structure in the way; nothing is written.
        UsageError: ``directory`` holds something else.
    """
    if len(golden_inputs) != len(golden_outputs):
        raise UsageError(f"{len(golden_inputs)} golden inputs and {len(golden_outputs)} outputs: give one for each")
    graph, tensors = write_graph(program)
    graph["conditions"] = size_conditions(program)
    if isinstance(certificate, Certificate):
        certificate = dataclasses.replace(certificate, notes=[*certificate.notes, *notes_on_sizes(graph)])
    blocks, graph["views"] = pack(tensors)
    runs = [
        goldens.golden_run(args, kwargs, out) for (args, kwargs), out in zip(golden_inputs, golden_outputs, strict=True)
    ]
    runs = [
        dataclasses.replace(run, edges=edges) for run, edges in zip(runs, golden_edges or [{}] * len(runs), strict=True)
    ]
    fields = {
        "source": dict(source or {}),
        "device": _device_of(tensors, graph),
        "signature": {k: graph[k] for k in ("parameters", "in_tree", "out_tree", "inputs")},
        "dynamic": graph["sizes"],
        "holds": sentences(graph),
        "blocks": report.to_dict()["blocks"],
        "golden": {"runs": len(runs), "distance": golden_distance},
    }

    def write(aside: Path) -> None:
        (aside / GRAPH).write_text(json.dumps(graph, allow_nan=False, separators=(",", ":")))
        save_weights(blocks, aside / WEIGHTS)
        (aside / CERTIFICATE).write_text(certificate.to_json())
        goldens.save_golden(runs, aside / goldens.FILE)

    return write_bundle(directory, "torch", write, fields)


class LoadedEngine(Engine):
    """A bundle that was loaded: call it as the model was called; it returns what the model returned.

    It has no state, so a copy is the engine itself. Pickled, it is the path of its bundle and how it was loaded.

    Attributes:
        manifest: what ``moeopt.json`` says.
        device: where it runs.
    """

    def __init__(self, manifest: Manifest, runner: GraphRunner, device: torch.device) -> None:
        self.manifest, self.device, self._runner = manifest, device, runner
        self._resident: ResidentExperts | None = None

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        return self._runner(*args, **kwargs)

    def __copy__(self) -> LoadedEngine:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        budget = None if self._resident is None else self._resident.residency.budget
        return _reopened, (str(self.manifest.directory.resolve()), str(self.device), self._runner.limits, budget)

    def run_flat(self, leaves: Sequence[Any]) -> PyObject:
        """Call it with the leaves of ``(args, kwargs)``, as golden runs store them."""
        if len(leaves) != len(self._runner.binding.inputs):
            raise UsageError(f"the bundle takes {len(self._runner.binding.inputs)} values, not {len(leaves)}")
        args, kwargs = build(self._runner.binding.tree, iter(leaves))
        return self._runner(*args, **kwargs)

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """While open, a call that is not done after ``seconds`` is a ``LimitError``. For one thread only."""
        self._runner.time = TimeLimit(seconds)
        try:
            yield
        finally:
            self._runner.time = None

    def keep_resident(self, budget: int) -> None:
        """Hold at most ``budget`` bytes of experts in memory, as ``moeopt.load(resident=)`` says."""
        layers = self._runner.expert_layers()
        if not layers:
            raise UsageError(
                f"resident= keeps experts on disk, and {self.manifest.directory} has none that its graph reads as they "
                "are in the file: leave it out"
            )
        others = len(self._runner.expert_calls) - len(layers)
        self._resident = ResidentExperts(budget, self.manifest.path(WEIGHTS), layers, others)
        self._runner.before_experts = self._resident.before

    @property
    def residency(self) -> Residency | None:
        """What keeping experts on disk did so far; None where ``resident`` was not given."""
        return None if self._resident is None else self._resident.residency

    @property
    def certificate(self) -> PyObject:
        """The certificate that was saved, as JSON types."""
        return self.manifest.read_json(CERTIFICATE)

    def __repr__(self) -> str:
        return f"<moeopt engine {self.manifest.directory} on {self.device}>"


def _reopened(directory: str, device: str, limits: LoadLimits, budget: int | None) -> LoadedEngine:
    """The engine of a bundle that another process, or another time, had loaded so; the files are checked again."""
    engine = load_torch_bundle(directory, device, limits, budget is not None)
    if budget is not None:
        engine.keep_resident(budget)
    return engine


def load_torch_bundle(
    directory: str | os.PathLike[str], device: PyObject = None, limits: LoadLimits = DEFAULT, resident: bool = False
) -> LoadedEngine:
    """Check a bundle and load it on ``device``, or on the device it was saved from.

    ``BundleError`` names the file and the reason; ``UsageError`` when this machine lacks the device. ``limits`` hold
    for calls too: one that takes more memory is a ``LimitError``. ``resident``: whether experts will be kept on disk,
    which is refused before weights are read.
    """
    manifest = read_manifest(directory)
    if manifest.backend != "torch":
        raise BundleError(f"{manifest.directory}: it is a bundle for {manifest.backend}, not torch: use moeopt.load")
    graph = manifest.read_json(GRAPH)
    manifest.path(CERTIFICATE)
    saved = manifest.data.get("device")
    if not isinstance(saved, str) or not isinstance(graph, dict) or not isinstance(graph.get("views"), dict):
        raise BundleError(f"{manifest.path(GRAPH)}: it lacks a device, or the table of its weights")
    try:
        torch.device(saved)
    except (RuntimeError, ValueError):
        raise BundleError(f"{manifest.directory}: it was saved on {saved!r:.60}, which is no device") from None
    where = _target_device(saved, device)
    if resident:
        check_resident(directory, where.type)
    try:
        with _opened(manifest.path(WEIGHTS), where) as blocks:
            views = graph["views"]
            runner = GraphRunner(
                graph, lambda key: unpack(key, views.get(key), blocks), _remap(saved, where), limits, manifest.bytes
            )
    except BundleError as err:
        raise BundleError(f"{manifest.path(GRAPH)}: {err}") from None
    return LoadedEngine(manifest, runner, where)


def verify_torch_bundle(
    directory: str | os.PathLike[str], device: PyObject = None, limits: LoadLimits = DEFAULT
) -> goldens.GoldenCheck:
    """Load a bundle, run its golden inputs again and compare; damage is a ``BundleError``, not a failed check."""
    engine = load_torch_bundle(directory, device, limits)
    manifest = engine.manifest
    runs = goldens.load_golden(manifest.path(goldens.FILE), engine.device)
    distance = goldens.read_stated(manifest.data.get("golden"), len(runs), str(manifest.directory))
    with engine.within(limits.seconds_for(manifest.bytes)):
        return goldens.check_golden(engine.run_flat, runs, distance)


class _opened:
    """The blocks of a safetensors file by name, each read once."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device, self._read = path, device, dict[str, torch.Tensor]()

    def __enter__(self) -> PyObject:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(self.path, framework="pt", device=str(self.device)).__enter__()  # type: ignore[no-untyped-call]
        except SafetensorError as err:
            raise BundleError(f"{self.path}: it is not a safetensors file ({err})") from None
        self._names = set(self._file.keys())
        return self._block

    def __exit__(self, *exc: PyObject) -> None:
        self._file.__exit__(*exc)

    def _block(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise BundleError(f"{self.path.name} has no block {name!r}")
        if name not in self._read:
            self._read[name] = aligned(self._file.get_tensor(name))
        return self._read[name]


def _device_of(tensors: Mapping[str, torch.Tensor], graph: Mapping[str, Any]) -> str:
    devices = {str(t.device) for t in tensors.values()}
    devices |= {i["device"] for i in graph["inputs"] if "device" in i}
    accelerators = sorted(d for d in devices if d != "cpu")
    if len(accelerators) > 1:
        raise NotSaveableError(f"the model lies on {', '.join(accelerators)}: a bundle runs on one device")
    return accelerators[0] if accelerators else "cpu"


def _target_device(saved: str, wanted: PyObject) -> torch.device:
    try:
        device = torch.device(saved if wanted is None else wanted)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as err:
        hint = "name another device, like device='cpu'"
        hint = f": {hint}, or none" if wanted is not None else f"; it was saved there: {hint}"
        raise UsageError(f"this machine has no device {saved if wanted is None else wanted!r}{hint}") from err
    return device


def _remap(saved: str, device: torch.device) -> PyObject:
    """Devices written in the graph: the saved one becomes the one that it runs on."""

    def to(name: str) -> torch.device:
        if name == saved or torch.device(saved) == torch.device(name):
            return device
        if name.split(":")[0] == torch.device(saved).type:
            return device
        if name == "cpu":
            return torch.device("cpu")
        raise BundleError(f"an op runs on {name!r}, and the bundle was saved on {saved!r}")

    return to
