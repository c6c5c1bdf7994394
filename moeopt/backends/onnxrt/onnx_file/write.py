"""The files of an optimised ONNX file: its graph with the new nodes, once plain and once with moeopt's own operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeopt.backends.onnxrt.build import BuiltGraph
from moeopt.backends.onnxrt.onnx_file.opset_fit import all_nodes, fit_opset
from moeopt.backends.onnxrt.onnx_file.parts import FilePart
from moeopt.backends.onnxrt.onnx_file.signature import file_signature
from moeopt.backends.onnxrt.onnx_file.stitch import DataFile, Replaced, new_names, stitch
from moeopt.backends.onnxrt.session import GRAPH, NATIVE, data_of
from moeopt.backends.onnxrt.site_records import ENDS
from moeopt.bundle.manifest import version
from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.onnx_in.read import OnnxFile
from moeopt.value_types import OnnxModel


def write_stitched(file: OnnxFile, regions: BuiltGraph, parts: Sequence[FilePart], slots: Sequence[str]) -> BuiltGraph:
    """The file with its ``parts`` replaced, in a new folder.

    Args:
        regions: the graph of all rewritten parts side by side, as it was built and verified.
        parts: those that were rewritten, in the order of that graph's outputs.
        slots: the file's name of each input of that graph's call.

    Raises:
        Declined: a new node has no form in the file's opset.
    """
    rewritten = _parsed(regions.directory / GRAPH)
    native = _parsed(regions.directory / NATIVE) if regions.native else None
    inputs = {
        entry["onnx"]: slot for entry, slot in zip(regions.signature["inputs"], slots, strict=True) if "onnx" in entry
    }
    outputs = [entry["onnx"] for entry in regions.signature["outputs"]]
    position = {id(node): number for number, node in enumerate(file.model.graph)}
    replaced = sorted(
        (
            Replaced(tuple(position[id(n)] for n in part.region.nodes), part.region.exit.name, inputs, output)
            for part, output in zip(parts, outputs, strict=True)
        ),
        key=lambda part: max(part.nodes),
    )
    graphs = [rewritten] if native is None else [rewritten, native]
    names = new_names(file, graphs, replaced)
    source = OnnxFile(str(regions.directory), rewritten, regions.directory)
    folder = TemporaryFolder()
    data = DataFile(Path(folder.name) / data_of(GRAPH))
    nodes = 0
    for graph, name in zip(graphs, (GRAPH, NATIVE), strict=False):
        opset = fit_opset(file, graph)
        data.take(graph, source)
        stitched = _stitched_proto(file, graph, replaced, names, opset, data)
        (Path(folder.name) / name).write_bytes(stitched.SerializeToString())
        nodes = nodes or len(stitched.graph.node)
    built = dataclasses.replace(regions, folder=folder, signature=file_signature(file))
    built.sites = [_renamed_record(record, names) for record in regions.sites]
    built.facts = _facts(built, nodes)
    return built


def _stitched_proto(
    file: OnnxFile, graph: OnnxModel, replaced: Sequence[Replaced], names: Mapping[str, str], opset: int, data: DataFile
) -> OnnxModel:
    made = stitch(file, graph, replaced, names, data).proto
    for entry in made.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    made.metadata_props.add(key="moeopt.version", value=version())
    return without_unused_domains(made)


def without_unused_domains(proto: OnnxModel) -> OnnxModel:
    """A graph without the names of domains that no node of it is of: exporters leave many, and a bundle names each."""
    used = {node.domain for node in all_nodes(proto.graph)}
    for number in reversed(range(len(proto.opset_import))):
        if proto.opset_import[number].domain not in ("", "ai.onnx", *used):
            del proto.opset_import[number]
    return proto


def untouched(file: OnnxFile) -> BuiltGraph:
    """The file as it is, its data in one file beside it."""
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    folder = TemporaryFolder()
    DataFile(Path(folder.name) / data_of(GRAPH)).take(proto, file)
    (Path(folder.name) / GRAPH).write_bytes(without_unused_domains(proto).SerializeToString())
    built = BuiltGraph(folder, file_signature(file))
    built.facts = _facts(built, len(proto.graph.node))
    return built


def _facts(built: BuiltGraph, nodes: int) -> dict[str, float]:
    size = sum(path.stat().st_size for path in built.directory.glob(f"{GRAPH}*"))
    return {"nodes": float(nodes), "bytes": float(size), "export_seconds": built.facts.get("export_seconds", 0.0)}


def _renamed_record(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {**record, **{end: names.get(record[end], record[end]) for end in ENDS}}


def _parsed(path: Path) -> OnnxModel:
    import onnx

    return onnx.load(str(path), load_external_data=False)
