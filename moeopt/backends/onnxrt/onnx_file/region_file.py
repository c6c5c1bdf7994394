"""One region of a file as a graph of its own: the nodes between its entries and its exit, as they stand in the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from moeopt.onnx_in.cuts import GraphRegion
from moeopt.onnx_in.order import bodies, reads
from moeopt.onnx_in.read import OnnxFile
from moeopt.value_types import OnnxGraph, OnnxModel


def only_region(file: OnnxFile, region: GraphRegion, run: Mapping[str, Tensor]) -> OnnxModel | None:
    """A model of the file's nodes that make the region's exit of its entries, loops and branches included.

    None where the file's graph has no such values: they may be inside of a loop that was written out.

    Args:
        run: what flows into the region on a call, as a file need not say of what type that is.
    """
    import onnx
    from onnx_ir.tensor_adapters import from_torch_dtype

    graph = file.proto.graph
    makers = {name: number for number, node in enumerate(graph.node) for name in node.output}
    held = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    entries = [str(value.name) for value in region.entries]
    known, needed, chosen = {*entries, *held}, {str(region.exit.name)}, set[int]()
    todo = list(needed)
    while todo:
        name = todo.pop()
        if name in known:
            continue
        if name not in makers:
            return None
        known |= set(graph.node[makers[name]].output)
        chosen.add(makers[name])
        read = set(reads(graph.node[makers[name]]))
        needed |= read
        todo += read
    proto = onnx.ModelProto(
        ir_version=file.proto.ir_version, opset_import=file.proto.opset_import, functions=file.proto.functions
    )
    made = proto.graph
    made.name = "region"
    made.node.extend(graph.node[number] for number in sorted(chosen))
    made.initializer.extend(t for t in graph.initializer if t.name in needed and t.name not in entries)
    made.sparse_initializer.extend(t for t in graph.sparse_initializer if t.values.name in needed)
    for value in region.entries:
        made.input.append(onnx.helper.make_tensor_value_info(value.name, from_torch_dtype(run[value.name].dtype), None))
    made.output.append(onnx.ValueInfoProto(name=region.exit.name))
    return proto


def described(model: OnnxModel) -> str:
    """A digest of a graph's nodes, their attributes and the shapes of their weights, and of no names."""
    sizes = {t.name: f"{t.data_type}{list(t.dims)}" for t in model.graph.initializer}
    return hashlib.sha256("\n".join(_lines(model.graph, sizes)).encode()).hexdigest()[:16]


def _lines(graph: OnnxGraph, sizes: dict[str, str]) -> Iterator[str]:
    sizes = sizes | {t.name: f"{t.data_type}{list(t.dims)}" for t in graph.initializer}
    for node in graph.node:
        told = [f"{a.name}={a.i}{a.f}{list(a.ints)}{a.s!r}" for a in node.attribute if not a.HasField("g")]
        yield f"{node.domain}.{node.op_type}({', '.join(sizes.get(name, '') for name in node.input)}) {told}"
        for body in bodies(node):
            yield from _lines(body, sizes)
