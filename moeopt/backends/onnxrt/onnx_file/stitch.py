"""New nodes in the place of old ones, message by message: whatever no region holds is not touched.

The file's own protobuf is copied. For each region, the nodes that nothing else reads go, the rewritten region's come to
where the last of them stood, and their ends get the names of the values that stood there. Weights are told by name:
those that only removed nodes read go; the new ones are added behind the others. Data files are written anew as one,
each weight at an aligned offset, copied piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeopt.backends.onnxrt.onnx_file.restored_bodies import with_bodies_restored
from moeopt.onnx_in.order import bodies, reads
from moeopt.onnx_in.read import OnnxFile, external_place, external_tensors
from moeopt.value_types import OnnxGraph, OnnxModel, OnnxNode, OnnxValue

ALIGNED = 4096
_PIECE = 1 << 22


@dataclass(frozen=True)
class Replaced:
    """One region: the nodes of the graph that it was, its exit, and the ends of the rewritten graph that it becomes.

    Attributes:
        nodes: positions of the old nodes.
        exit: the value that the last of them makes.
        inputs: names in the rewritten graph, with the names in the file for each.
        output: the rewritten graph's name for the exit.
    """

    nodes: tuple[int, ...]
    exit: str
    inputs: Mapping[str, str]
    output: str


@dataclass
class Stitched:
    """A graph in which regions were replaced.

    Attributes:
        proto: the new graph.
        renamed: what values of the rewritten graph are called in it.
        removed: names of the file's weights that are no longer there.
    """

    proto: OnnxModel
    renamed: dict[str, str]
    removed: list[str] = field(default_factory=list)


def stitch(
    file: OnnxFile, rewritten: OnnxModel, replaced: Sequence[Replaced], renamed: Mapping[str, str], data: DataFile
) -> Stitched:
    """Put the nodes of ``rewritten`` into a copy of the file's graph.

    Args:
        rewritten: one graph of all regions side by side, its weights in ``data`` already.
        renamed: names of ``rewritten``'s values in the file, from :func:`new_names`.
        data: gets those of the file's weights that stay.
    """
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(file.proto)
    graph = proto.graph
    gone = _removable(graph, replaced)
    old = list(graph.node)
    read_before = {name for number in gone for name in reads(old[number])}
    nodes = _with_parts(old, gone, rewritten, replaced, renamed)
    nodes = with_bodies_restored(nodes, file.proto.graph, _inside(replaced), file.written)
    del graph.node[:]
    graph.node.extend(nodes)
    read_now = {name for node in graph.node for name in reads(node)} | {v.name for v in graph.output}
    read_before |= _read_in_bodies(file)
    removed = [t.name for t in graph.initializer if t.name in read_before and t.name not in read_now]
    _drop(graph.initializer, set(removed))
    data.take(proto, file)
    made_now = {name for node in graph.node for name in node.output} | {v.name for v in graph.input}
    made_before = {name for node in old for name in node.output}
    _drop(graph.value_info, (made_before | set(removed)) - made_now)
    used = {name for node in graph.node for name in reads(node)}
    for tensor in rewritten.graph.initializer:
        if renamed[tensor.name] in used:
            added = graph.initializer.add()
            added.CopyFrom(tensor)
            added.name = renamed[tensor.name]
    known = {opset.domain for opset in proto.opset_import}
    domains = {node.domain for node in graph.node}
    proto.opset_import.extend(
        o for o in rewritten.opset_import if o.domain and o.domain not in known and o.domain in domains
    )
    return Stitched(proto, dict(renamed), removed)


def _inside(replaced: Sequence[Replaced]) -> set[int]:
    """Where the nodes of all regions are."""
    return {number for part in replaced for number in part.nodes}


def _read_in_bodies(file: OnnxFile) -> set[str]:
    """What is read by the nodes that bodies became."""
    became = (node for node in file.proto.graph.node if not file.written.keys().isdisjoint(node.output))
    return {name for node in became for name in reads(node)}


def _with_parts(
    old: Sequence[OnnxNode],
    gone: set[int],
    rewritten: OnnxModel,
    replaced: Sequence[Replaced],
    renamed: Mapping[str, str],
) -> list[OnnxNode]:
    """Copies of the nodes that stay, with the new ones where the last of each region's stood."""
    parts = _parts(rewritten.graph, replaced)
    places = {max(part.nodes): part for part in replaced}
    nodes = []
    for number, node in enumerate(old):
        if number not in gone:
            nodes.append(_renamed_node(node, {}))
        if number in places:
            nodes += [_renamed_node(new, renamed) for new in parts[places[number].output]]
    return nodes


def new_names(file: OnnxFile, rewritten: Sequence[OnnxModel], replaced: Sequence[Replaced]) -> dict[str, str]:
    """A name in the file for every value of the rewritten graphs: its own where that is free."""
    ends = {inner: outer for part in replaced for inner, outer in part.inputs.items()}
    ends |= {part.output: part.exit for part in replaced}
    taken = {*all_names(file.proto.graph), *(node_key(node) for node in file.proto.graph.node)}
    taken |= {name for node in file.written.values() for body in bodies(node) for name in all_names(body)}
    renamed = dict(ends)
    for proto in rewritten:
        for name in (*all_names(proto.graph), *(node_key(node) for node in proto.graph.node)):
            if name and name not in renamed:
                made, number = name, 0
                while made in taken:
                    number += 1
                    made = f"{name}/moeopt" + (f"_{number}" if number > 1 else "")
                taken.add(made)
                renamed[name] = made.removeprefix("node:")
    return renamed


def all_names(graph: OnnxGraph) -> Iterator[str]:
    """The names of a graph's values and nodes, those of its bodies included, and of values that are only described."""
    for value in (*graph.input, *graph.initializer, *graph.value_info):
        yield value.name
    for node in graph.node:
        yield from node.output
        for body in bodies(node):
            yield from all_names(body)


def _removable(graph: OnnxGraph, replaced: Sequence[Replaced]) -> set[int]:
    """The nodes of the regions that nothing outside of these reads any more once the exits are made otherwise."""
    inside = {number for part in replaced for number in part.nodes}
    exits = {part.exit for part in replaced}
    needed = {v.name for v in graph.output} - exits
    for number, node in enumerate(graph.node):
        if number not in inside:
            needed |= set(reads(node))
    gone: set[int] = set()
    for number in sorted(inside, reverse=True):
        node = graph.node[number]
        if all(name in exits or name not in needed for name in node.output):
            gone.add(number)
        else:
            needed |= set(reads(node))
    return gone


def _parts(graph: OnnxGraph, replaced: Sequence[Replaced]) -> dict[str, list[Any]]:
    """The nodes of the rewritten graph that each region's output needs, by that output; each node is in one of them."""
    made = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    taken: set[int] = set()
    parts = {}
    for part in replaced:
        todo, mine = [part.output], set()
        while todo:
            number = made.get(todo.pop())
            if number is not None and number not in taken:
                taken.add(number)
                mine.add(number)
                todo += list(reads(graph.node[number]))
        parts[part.output] = [graph.node[number] for number in sorted(mine)]
    return parts


def _renamed_node(node: OnnxNode, renamed: Mapping[str, str]) -> OnnxNode:
    import onnx

    made = onnx.NodeProto()
    made.CopyFrom(node)
    if renamed:
        made.name = renamed.get(node_key(node), node.name)
        _rename(made, renamed)
    return made


def node_key(node: OnnxNode) -> str:
    """What a node's name is looked up under: names of nodes and of values are apart."""
    return f"node:{node.name}"


def _rename(node: OnnxNode, renamed: Mapping[str, str]) -> None:
    for names in (node.input, node.output):
        for number, name in enumerate(names):
            names[number] = renamed.get(name, name)
    for body in bodies(node):
        for value in (*body.input, *body.output, *body.initializer, *body.value_info):
            value.name = renamed.get(value.name, value.name)
        for inner in body.node:
            _rename(inner, renamed)


def _drop(entries: OnnxValue, names: set[str]) -> None:
    gone = [number for number, entry in enumerate(entries) if entry.name in names]
    last = len(gone)
    while last:  # neighbours go at once: what follows is moved each time
        first = last - 1
        while first and gone[first - 1] == gone[first] - 1:
            first -= 1
        del entries[gone[first] : gone[last - 1] + 1]
        last = first


class DataFile:
    """The one file of weights of a stitched model; the same bytes of the same file are written once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[tuple[str, int, int], int] = {}
        self._size = 0

    def take(self, proto: OnnxModel, source: OnnxFile) -> None:
        """Copy what ``proto``'s tensors have in ``source``'s files, and let the tensors say where it lies now."""
        for tensor in external_tensors(proto.graph):
            path, offset, length = external_place(source, tensor)
            length = length if length is not None else _length_of(tensor)
            at = self._copy(path, offset, length)
            del tensor.external_data[:]
            for key, value in (("location", self._path.name), ("offset", at), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))

    def _copy(self, path: Path, offset: int, length: int) -> int:
        key = (str(path), offset, length)
        if key in self._written:
            return self._written[key]
        with path.open("rb") as source, self._path.open("ab") as target:
            at = -(-self._size // ALIGNED) * ALIGNED if length >= ALIGNED else -(-self._size // 64) * 64
            target.write(b"\0" * (at - self._size))
            source.seek(offset)
            left = length
            while left:
                piece = source.read(min(left, _PIECE))
                target.write(piece)
                left -= len(piece)
        self._size = at + length
        self._written[key] = at
        return at


def _length_of(tensor: OnnxValue) -> int:
    import onnx_ir as ir

    bits: int = ir.DataType(tensor.data_type).bitwidth * math.prod(tensor.dims)
    return -(-bits // 8)
