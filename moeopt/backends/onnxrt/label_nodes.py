"""Nodes of an exported graph by the block that they belong to, and weights that stand twice as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moeopt.backends.onnxrt.known_answer import BLOCK, make_probe
from moeopt.backends.onnxrt.site_records import ENDS, describe
from moeopt.bundle.manifest import version
from moeopt.lower.onnx.names import name_by_module
from moeopt.lower.onnx.plan import BlockPlan, kind
from moeopt.value_types import PyObject


def label_nodes(model: PyObject, blocks: Sequence[str]) -> dict[str, list[Any]]:
    """Say in each node's metadata which block it belongs to, and what wrote the graph; the nodes of each block.

    Nodes outside of them are named by their modules. What the exporter left in the metadata, source paths of the
    machine that it ran on among it, is dropped.
    """
    name_by_module(model, blocks)
    inside: dict[str, list[Any]] = {block: [] for block in blocks}
    for node in model.graph.all_nodes():
        for key in [k for k in node.metadata_props if k.startswith("pkg.")]:
            del node.metadata_props[key]
        block = node.metadata_props.get(BLOCK) or node.name.rpartition("/")[0]
        while block and block not in inside:
            block = block.rpartition("/")[0]
        if block:
            node.metadata_props[BLOCK] = block
            inside[block].append(node)
    model.metadata_props["moeopt.version"] = version()
    model.producer_name, model.producer_version = "moeopt", version()
    return inside


def describe_sites(
    sites: list[Any], names: list[str], plan: BlockPlan, calls: dict[int, tuple[Any, ...]], made: dict[str, list[Any]]
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, torch.Tensor], float]]]:
    """The records of the sites that the graph holds, and a probe for each kind of them.

    ``calls``: what each site's node read and gave before a lowering took its place.
    """
    results = {number: _result(made[sites[number].name]) for number in calls}
    now = {id(calls[number][-1]): value for number, value in results.items()}
    records: list[dict[str, Any]] = []
    probes: list[tuple[dict[str, torch.Tensor], float]] = []
    kinds: dict[Any, int] = {}
    for number, call in calls.items():
        site, name, result = sites[number], names[number], results[number]
        record = describe(site, name, plan.written(site).reason)
        if record is None or result is None:
            continue
        key = (kind(site), name)
        if key not in kinds:
            kinds[key] = len(probes)
            probes.append(make_probe(site))
        values = [*(now.get(id(value), value) for value in call[:-1]), result]
        names_of_ends = {end: value.name for end, value in zip(ENDS, values, strict=True)}
        records.append(record | names_of_ends | {"probe": kinds[key], "nodes": len(made[site.name])})
    return records, probes


def _result(nodes: list[Any]) -> PyObject:
    """The one value that a block's nodes make for others; None where nothing reads it."""
    inside = {id(node) for node in nodes}
    for value in (v for node in nodes for v in node.outputs):
        if value.is_graph_output() or any(id(user) not in inside for user, _ in value.uses()):
            return value
    return None


def deduplicate(graph: PyObject) -> None:
    """Parameters that share memory (tied weights) are written once."""
    import onnx_ir as ir

    first: dict[tuple[Any, ...], Any] = {}
    for name, value in list(graph.initializers.items()):
        if isinstance(value.const_value, ir.LazyTensor):  # an expert's weight: looking at it would make it
            continue
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, torch.Tensor) or raw.numel() < 1024:
            continue
        key = (raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype)
        if key in first:
            ir.convenience.replace_all_uses_with(value, first[key])
            graph.initializers.pop(name)
        else:
            first[key] = value
