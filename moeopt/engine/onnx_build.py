"""From an optimised model to a directory with ``model.onnx``: trace, convert, lower, write."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeopt.backends.onnxrt.assemble import replace_sites
from moeopt.backends.onnxrt.export import emitting, own_outputs, quiet, to_onnx
from moeopt.backends.onnxrt.plan import Plan
from moeopt.backends.onnxrt.session import EXTERNAL_DATA, GRAPH, available, provider_named, runtime
from moeopt.backends.onnxrt.widen import widen_graph
from moeopt.engine.program import export_program, roomier
from moeopt.engine.signature import describe_call, functional
from moeopt.errors import UsageError
from moeopt.options import Options


@dataclass
class Built:
    """A written graph: its folder, how it is called, and what was chosen for each site."""

    folder: tempfile.TemporaryDirectory[str]
    signature: dict[str, Any]
    lowerings: dict[str, str] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return Path(self.folder.name)


def onnx_plan(options: Options) -> Plan:
    """The plan that ``options.target``, else ``options.device``, asks for; ``UsageError`` where it cannot run."""
    runtime()
    wanted = options.target or (None if options.device is None else options.device.type)
    provider = provider_named(wanted)
    if provider not in available():
        raise UsageError(f"provider {provider!r} is not on this machine; it has: {', '.join(available())}")
    return Plan(provider)


def build_onnx(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan, say: Callable[[str], None]
) -> Built:
    """Export ``model``, whose blocks were rewritten, for ``plan.provider``.

    Raises:
        NotSaveableError: torch.export or ONNX cannot hold the model; the message names what is in the way.
    """
    started = time.perf_counter()
    say("tracing the whole model")
    args, kwargs = roomier(model, args, kwargs)
    with emitting(model) as sites, quiet():
        program = export_program(model, args, kwargs)
    program = functional(program)
    signature = describe_call(program)
    say("converting it to ONNX")
    graph = to_onnx(program)
    _name_ends(graph.graph, signature)
    return write_graph(graph, sites, signature, plan, say, started)


def write_graph(
    model: Any, sites: list[Any], signature: dict[str, Any], plan: Plan, say: Callable[[str], None], started: float
) -> Built:
    """Lower the sites of an ``onnx_ir.Model`` and write it with its weights beside it."""
    import onnx_ir as ir

    say(f"lowering {len(sites)} expert blocks")
    if plan.provider == "cpu":
        widen_graph(model)
    names = replace_sites(model, [plan.legal(s) for s in sites], plan.lowering)
    own_outputs(model.graph)
    _deduplicate(model.graph)
    folder = tempfile.TemporaryDirectory(prefix="moeopt-")
    say("writing the engine")
    ir.save(model, f"{folder.name}/{GRAPH}", external_data=EXTERNAL_DATA)
    built = Built(folder, signature, dict(zip([s.name for s in sites], names, strict=True)))
    size = sum(p.stat().st_size for p in built.directory.iterdir())
    built.facts = {
        "nodes": float(len(model.graph)),
        "bytes": float(size),
        "export_seconds": time.perf_counter() - started,
    }
    return built


def _name_ends(graph: Any, signature: dict[str, Any]) -> None:
    """``input_n`` is the n-th leaf of the arguments; ``output_n`` the n-th tensor of the result."""
    by_name = {value.name: value for value in graph.inputs}
    for number, entry in enumerate(signature["inputs"]):
        if "dtype" in entry and entry["name"] in by_name:
            by_name[entry["name"]].name = f"input_{number}"
    own_outputs(graph)
    for number, value in enumerate(graph.outputs):
        value.name = f"output_{number}"


def _deduplicate(graph: Any) -> None:
    """Parameters that share memory (tied weights) are written once."""
    import onnx_ir as ir

    first: dict[tuple[Any, ...], Any] = {}
    for name, value in list(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, torch.Tensor) or raw.numel() < 1024:
            continue
        key = (raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype)
        if key in first:
            ir.convenience.replace_all_uses_with(value, first[key])
            graph.initializers.pop(name)
        else:
            first[key] = value
