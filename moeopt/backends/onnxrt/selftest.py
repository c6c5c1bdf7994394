"""The first time a bundle is loaded on a machine, its blocks are asked what they were asked when it was saved.

A runtime of another version, or on another device, may compute a node otherwise than the one that the engine was
verified on. Each kind of block is run alone on its probe. One that answers wrongly, or does not run at all, gets
the next lowering that answers rightly, with the weights read back from the bundle; the rewritten graph lies in a
temporary folder. The user is warned, and the engine's notes say what was replaced. What passed is remembered for
the process.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeopt.backends.onnxrt.known_answer import BLOCK, cut_out, feeds_of, known_answer_test, session_of
from moeopt.backends.onnxrt.lowerings import LOWERINGS, MAPPED_LOWERINGS, QUANTIZED_LOWERINGS
from moeopt.backends.onnxrt.select import ranked
from moeopt.backends.onnxrt.session import EXTERNAL_DATA, GRAPH, Prepare, Session, no_change
from moeopt.backends.onnxrt.site_records import ENDS, read_back, tensor_of
from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.errors import BundleError, Declined, EngineFallbackWarning, EngineNotExecutableError, UsageError
from moeopt.listed import listed
from moeopt.lower.onnx.assemble import one_op
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.value_types import JsonValue, OnnxModel, OnnxValue

Probe = tuple[Mapping[str, Tensor], float]
Check = Callable[[bytes, Mapping[str, Tensor]], None]
"""Refuses a model whose call with these inputs takes more time or memory than it may."""


@dataclass
class SelfTestResult:
    """Where the graph to run lies, and what was replaced; ``folder`` is None where the bundle's own graph is good."""

    directory: Path
    graph: str = GRAPH
    notes: list[str] = field(default_factory=list)
    folder: TemporaryFolder | None = None


def self_test(
    directory: Path,
    proto: OnnxModel,
    records: Sequence[Mapping[str, Any]],
    probes: Sequence[Probe],
    provider: str,
    graph: str = GRAPH,
    check: Check | None = None,
    seconds: float | None = None,
) -> SelfTestResult:
    """Ask every kind of block of the graph in the file ``graph`` its probe; replace those that answer wrongly.

    ``check`` is asked before a saved block runs, and ``seconds`` is how long an answer may take.

    Raises:
        LimitError: a block takes more than it may.
        EngineNotExecutableError: no lowering of a block answers rightly here; the message has each one's reason.
    """
    wrong = wrong_answers(directory, proto, records, probes, provider, check, seconds)
    outcome = SelfTestResult(directory, graph)
    if not wrong:
        return outcome
    import onnx_ir as ir

    model = ir.load(directory / graph)
    for number, reason in wrong.items():
        same = [r for r in records if r.get("probe") == number]
        _replace(model, same, probes[number], provider, reason, outcome)
    outcome.folder = TemporaryFolder()
    outcome.directory, outcome.graph = Path(outcome.folder.name), GRAPH
    ir.save(model, outcome.directory / GRAPH, external_data=EXTERNAL_DATA)
    for note in outcome.notes:
        warnings.warn(note, EngineFallbackWarning, stacklevel=4)
    return outcome


def wrong_answers(
    directory: Path,
    proto: OnnxModel,
    records: Sequence[Mapping[str, Any]],
    probes: Sequence[Probe],
    provider: str,
    check: Check | None = None,
    seconds: float | None = None,
    prepare: Prepare = no_change,
) -> dict[int, str]:
    """Which of ``probes`` a graph's blocks answer wrongly, and how, in words; arguments are those of the self-test."""
    wrong = {}
    for number, probe in enumerate(probes):
        record = next((r for r in records if r.get("probe") == number), None)
        if record is None:
            raise BundleError(f"{directory}: probe {number} belongs to no block")
        reason = _known_answer_test(directory, proto, record, probe, provider, check, seconds, prepare)
        if reason:
            wrong[number] = reason
    return wrong


def _known_answer_test(
    directory: Path,
    proto: OnnxModel,
    record: Mapping[str, Any],
    probe: Probe,
    provider: str,
    check: Check | None,
    seconds: float | None,
    prepare: Prepare,
) -> str:
    """What is wrong with the saved nodes of a block, or ""."""
    part, names = cut_out(proto, record), [record[end] for end in ENDS[:3]]
    if check is not None:
        check(part, feeds_of(probe[0], names))
    return _asked(lambda: session_of(part, directory, provider, prepare), probe, names, seconds)


def _asked(make: OnnxValue, probe: Probe, names: Sequence[str], seconds: float | None = None) -> str:
    try:
        return known_answer_test(make(), probe[0], names, probe[1], seconds)
    except (UsageError, BundleError):
        raise
    except Exception as err:  # ONNX Runtime's own, of many classes: a node that it does not run here
        lines = str(err).strip().splitlines()
        return f"it does not run ({type(err).__name__}: {lines[0][:200] if lines else ''})"


def _replace(
    model: OnnxModel,
    records: Sequence[Mapping[str, Any]],
    probe: Probe,
    provider: str,
    reason: str,
    outcome: SelfTestResult,
) -> None:
    """Lower the blocks of one kind otherwise, in an ``onnx_ir`` model."""
    first = records[0]
    refused = [f"{first['lowering']}: {reason}"]
    lowering: Lowering | None = None
    try:
        before = next(low for low in LOWERINGS if low.name == first["lowering"])
        sites = [_site_back(model, record, before) for record in records]
    except StopIteration:
        codes = any(low.name == first["lowering"] for low in (*QUANTIZED_LOWERINGS, *MAPPED_LOWERINGS))
        refused.append(
            "its experts are codes, which are not read back"
            if codes
            else f"this moeopt has no lowering {first['lowering']!r} to read its weights back with"
        )
    except Declined as err:
        refused.append(err.reason)
    else:
        lowering = _next_lowering(sites[0], first, probe, provider, refused)
    if lowering is None:
        raise EngineNotExecutableError(
            f"block {first['name']} computes something else on {provider} than it was verified to, and no other "
            f"lowering takes its place ({'; '.join(refused)}): optimise the model again on this machine"
        )
    for record, site in zip(records, sites, strict=True):
        splice(model, record, site, lowering)
    names = listed(r["name"] for r in records)
    outcome.notes.append(
        f"{names}: lowering {first['lowering']} fails its self-test on {provider} ({reason}); {lowering.name} runs "
        "instead. Optimise the model again on this machine to have the whole of it verified here"
    )


def _site_back(model: OnnxModel, record: Mapping[str, Any], lowering: Lowering) -> ExpertsNode:
    weights = model.graph.initializers

    def saved(name: str) -> Tensor | None:
        value = weights.get(name)
        return None if value is None or value.const_value is None else tensor_of(value.const_value)

    return read_back(record, lowering, saved)


def _next_lowering(
    site: ExpertsNode, record: Mapping[str, Any], probe: Probe, provider: str, refused: list[str]
) -> Lowering | None:
    """The quickest other lowering that answers rightly; ``refused`` gets the others' reasons."""
    for choice in ranked(site, provider):
        if choice.name == record["lowering"]:
            continue
        reason = choice.reason
        if choice.lowering is not None:
            lowering = choice.lowering
            reason = _asked(lambda low=lowering: _alone(site, low, provider), probe, ENDS[:3])
            if not reason:
                return lowering
        refused.append(f"{choice.name}: {reason}")
    return None


def _alone(site: ExpertsNode, lowering: Lowering, provider: str) -> Session:
    """A session of one block; its file is gone at once, and the session keeps what it read."""
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(prefix="moeopt-") as folder:
        ir.save(one_op(site, lowering), f"{folder}/{GRAPH}", external_data=EXTERNAL_DATA)
        return Session(f"{folder}/{GRAPH}", provider)


def splice(model: OnnxModel, record: Mapping[str, Any], site: ExpertsNode, lowering: Lowering) -> None:
    """Put ``lowering``'s nodes for ``site`` in the place of the block's, in an ``onnx_ir`` model."""
    import onnx_ir as ir

    graph = model.graph
    old = [n for n in graph if n.metadata_props.get(BLOCK) == record["name"]]
    values = {v.name: v for v in (*graph.inputs, *graph.initializers.values())}
    values |= {v.name: v for n in graph for v in n.outputs}
    x, ids, weights, result = (values[record[end]] for end in ENDS)
    stale = {v.name for n in old for v in n.inputs if v is not None and v.is_initializer()}
    builder = Builder(site.name)
    y = lowering.emit(builder, site, x, ids, weights)
    y.type, y.shape = result.type, result.shape
    for value in (v for n in old for v in n.outputs):
        value.name = f"{value.name}~"  # free the names: the new nodes may use them
    for node in builder.nodes:
        node.metadata_props[BLOCK] = site.name
    graph.insert_before(old[0], builder.nodes)
    ir.convenience.replace_all_uses_with(result, y, replace_graph_outputs=True)
    for value in (v for n in builder.nodes for v in n.outputs):
        if value.name == record["y"]:
            value.name = f"{value.name}/inner"
    y.name = record["y"]  # the graph's end, or what the record of a later block names
    graph.remove(old, safe=True)
    for name in stale:
        if not graph.initializers[name].uses():
            graph.initializers.pop(name)
    for value in builder.initializers:
        while value.name in graph.initializers:  # a damaged graph keeps the old one, which no node of the block reads
            value.name = f"{value.name}/again"
        graph.register_initializer(value)
    graph.opset_imports.update(builder.domains)


def load_probes(path: Path, records: JsonValue) -> list[Probe]:
    """The probes of a bundle; ``records`` are the manifest's, ``{"budget": ...}`` each."""
    from safetensors import SafetensorError, safe_open

    parts = (*ENDS[:3], "y")
    try:
        budgets = [float(r["budget"]) for r in records]
        with safe_open(path, framework="pt") as file:
            probes: list[Probe] = [
                ({part: file.get_tensor(f"{n}.{part}") for part in parts}, budget) for n, budget in enumerate(budgets)
            ]
    except (SafetensorError, KeyError, ValueError, TypeError) as err:
        raise BundleError(f"{path}: it holds other probes than the manifest says ({str(err)[:80]})") from None
    if any(p["y"].dtype != torch.float64 or not 0 <= b < 1 for p, b in probes):
        raise BundleError(f"{path}: a probe's result is no float64, or its budget no distance")
    return probes
