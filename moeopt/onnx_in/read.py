"""An ONNX file or ``ModelProto``, read as a stranger's: weights stay in their files, and each must lie where it says.

What may not be: data files outside the model's folder, tensors that are not as long as their shapes say, names that
two values share, nodes that read what no node makes before them (a cycle), operators of versions before opset 13.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeopt.errors import BundleError, UsageError
from moeopt.onnx_in.endless import check_loops
from moeopt.onnx_in.functions import check_functions, inlined
from moeopt.onnx_in.order import bodies, in_order
from moeopt.onnx_in.stored import check_listed, sparse_in, tensors_in
from moeopt.untrusted import open_regular, shown_line
from moeopt.value_types import OnnxGraph, OnnxModel, OnnxNode, OnnxValue, PyObject

MOST_BYTES = 1 << 31
"""Of a protobuf message."""
OLDEST = 13
"""The opset since which softmax, squeeze and reductions are what the interpreter takes them for."""
SUFFIXES = (".onnx", ".onnx.pb", ".ort")


@dataclass
class OnnxFile:
    """A model as it was read.

    Attributes:
        name: how messages call it.
        proto: the ``onnx.ModelProto``; bytes of external weights are not in it.
        directory: where its data files lie; None for a model without any.
        path: None for a model that was given as a value.
        written: of a copy whose bodies were written out, by value, the node of the file that the value is a part of.
    """

    name: str
    proto: OnnxModel
    directory: Path | None = None
    path: Path | None = None
    written: dict[str, OnnxNode] = field(default_factory=dict, repr=False)
    _model: OnnxModel = field(default=None, repr=False)

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return next((int(o.version) for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)

    @property
    def model(self) -> OnnxValue:
        """The same as an ``onnx_ir.Model``, made once; external weights are mapped."""
        if self._model is None:
            import onnx_ir as ir

            self._model = ir.serde.deserialize_model(self.proto)
            if self.directory is not None:
                ir.external_data.set_base_dir(self._model.graph, self.directory)
        return self._model


def is_onnx(subject: PyObject) -> bool:
    """Whether a value is an ``onnx.ModelProto``, an ``onnx_ir.Model`` or the path of a file called ``.onnx``."""
    if isinstance(subject, (str, os.PathLike)):
        return os.fspath(subject).endswith(SUFFIXES)
    kind = type(subject)
    return kind.__name__ in ("ModelProto", "Model") and kind.__module__.split(".")[0] in ("onnx", "onnx_ir")


def read_onnx(subject: PyObject) -> OnnxFile:
    """Read and check a file or a model.

    Raises:
        UsageError: there is no such file, or it is none that moeopt reads; the message names the node or the weight.
    """
    if isinstance(subject, (str, os.PathLike)):
        found = _from_path(Path(subject))
    else:
        found = OnnxFile("the ONNX model", _as_proto(subject))
    found.proto = in_order(found.proto)
    _check(found)
    found.proto = inlined(found.name, found.proto)
    check_loops(found.name, found.proto.graph)
    return found


def _as_proto(subject: PyObject) -> OnnxModel:
    if type(subject).__name__ == "ModelProto":
        return subject
    import onnx_ir as ir

    return ir.to_proto(subject)


def _from_path(path: Path) -> OnnxFile:
    if not path.exists():
        raise UsageError(f"{path}: there is no such file")
    if path.is_dir():
        raise UsageError(f"{path} is a directory: give the .onnx file in it")
    if path.name.endswith(".ort"):
        raise UsageError(f"{path} is in ONNX Runtime's own format: give the .onnx file that it was made of")
    import onnx
    from google.protobuf.message import DecodeError

    proto = onnx.ModelProto()
    real = path.resolve()
    if real.stat().st_size >= MOST_BYTES:
        raise UsageError(f"{path}: it has {real.stat().st_size} bytes, more than any ONNX graph's")
    try:
        with open(open_regular(real), "rb") as file:
            proto.ParseFromString(file.read())
    except (DecodeError, BundleError) as err:
        raise UsageError(f"{path}: it is not an ONNX graph ({err}): it was damaged or cut off") from None
    return OnnxFile(str(path), proto, path.absolute().parent, path)


def _check(file: OnnxFile) -> None:
    where, proto = file.name, file.proto
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise UsageError(f"{where}: it is not an ONNX graph: it was damaged or cut off")
    if file.opset < 1:
        raise UsageError(
            f"{where}: it does not say of which opset its operators are: add opset_import "
            "(onnx.helper.make_opsetid('', version)), or export the model again"
        )
    if file.opset < OLDEST:
        raise UsageError(
            f"{where}: it is of opset {file.opset}, and moeopt reads {OLDEST} and newer: convert it with "
            f"onnx.version_converter.convert_version(model, {OLDEST + 5}), or export the model again"
        )
    if len(versions := {int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")}) > 1:
        raise UsageError(
            f"{where}: it says of two opsets that its operators are of them ({', '.join(map(str, sorted(versions)))}): "
            "take one of the two out of opset_import, or export the model again"
        )
    if proto.training_info:
        raise UsageError(f"{where}: it holds training information: export the model for inference")
    _check_graph(file, proto.graph, set())
    _check_held(file)
    check_functions(where, proto)
    for function in proto.functions:
        _check_order(where, function.node, set(), set(function.input), f"the function {function.name}")


def _check_graph(file: OnnxFile, graph: OnnxGraph, outer: set[str]) -> None:
    names = [v.name for v in graph.input]
    weights = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    twice = _repeated(names) or _repeated(weights)
    if twice:
        raise UsageError(f"{file.name}: {shown_line(twice)!r} names two values: it was damaged or edited")
    given = _repeated([v.name for v in graph.output])
    if given:
        raise UsageError(
            f"{file.name}: the graph gives {shown_line(given)!r} twice, and a result is told by its name: take one of "
            "the two out of graph.output"
        )
    made = {*names, *weights}
    here = _check_order(file.name, graph.node, outer, made, f"the graph {graph.name!r}")
    fresh = here - outer  # names are entered and taken out again: a set for each body would grow with the graph
    outer |= fresh
    for node in graph.node:
        for body in bodies(node):
            _check_graph(file, body, outer)
    lost = [v.name for v in graph.output if v.name not in outer]
    outer -= fresh
    if lost:
        raise UsageError(f"{file.name}: nothing makes the output {shown_line(lost[0])!r}: it was damaged or cut off")


def _check_held(file: OnnxFile) -> None:
    """``UsageError`` for tensors, also of functions, that lack numbers, or that say where these are: an engine's file
    holds whole ones."""
    for tensor in file.proto.graph.initializer:
        check_tensor(file, tensor)
    for nodes in (file.proto.graph.node, *(f.node for f in file.proto.functions)):
        for tensor in tensors_in(nodes):
            check_tensor(file, tensor)
    sparse = [tensor.values.name for tensor in file.proto.graph.sparse_initializer]
    for nodes in (file.proto.graph.node, *(f.node for f in file.proto.functions)):
        sparse += sparse_in(nodes)
    if sparse:
        raise UsageError(
            f"{file.name}: {shown_line(sparse[0])!r} holds a sparse tensor, and moeopt reads whole ones: store it as a "
            "plain tensor, or export the model again"
        )


def _check_order(where: str, nodes: OnnxNode, outer: set[str], own: set[str], what: str) -> set[str]:
    """Every name that the graph itself makes; ``UsageError`` for one that is read before it is made, or made twice."""
    made = set(own)
    for number, node in enumerate(nodes):
        label = shown_line(node.name or f"{node.op_type} number {number}")
        for name in node.input:
            if name and name not in made and name not in outer:
                raise UsageError(
                    f"{where}: the node {label!r} in {shown_line(what)} reads {shown_line(name)!r}, which no node "
                    "before it makes: the graph holds a cycle, or it was damaged or cut off"
                )
        for name in node.output:
            if name and name in made:
                raise UsageError(f"{where}: {shown_line(name)!r} is made twice, the second time by the node {label!r}")
            if name:
                made.add(name)
    return made


def check_tensor(file: OnnxFile, tensor: OnnxValue) -> None:
    """``UsageError`` unless a weight's bytes are as many as its shape says, in the graph or in a file beside it."""
    import onnx
    import onnx_ir as ir

    name = shown_line(tensor.name)
    count = math.prod(tensor.dims)
    if any(n < 0 for n in tensor.dims) or count > 1 << 40:
        raise UsageError(f"{file.name}: the weight {name!r} has the shape {list(tensor.dims)[:8]}")
    try:
        dtype = ir.DataType(tensor.data_type)
        want = -(-count * dtype.bitwidth // 8) if dtype != ir.DataType.STRING else None
    except (ValueError, TypeError):
        raise UsageError(f"{file.name}: the weight {name!r} has the element type {tensor.data_type}") from None
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if not tensor.raw_data:
            check_listed(file.name, tensor, dtype.name, dtype.bitwidth if want is not None else None)
        elif len(tensor.raw_data) != want:
            raise UsageError(
                f"{file.name}: the weight {name!r} has {len(tensor.raw_data)} bytes, and its shape says {want}"
            )
        return
    path, offset, length = external_place(file, tensor)
    if want is None or length not in (None, want):
        raise UsageError(f"{file.name}: the weight {name!r} has {length} bytes, and its shape says {want}")
    if offset + want > path.stat().st_size:
        raise UsageError(
            f"{file.name}: the weight {name!r} ends at byte {offset + want}, and {path.name} has {path.stat().st_size}"
            ": copy the file again"
        )


def external_place(file: OnnxFile, tensor: OnnxValue) -> tuple[Path, int, int | None]:
    """The file, the offset and the length of a weight that lies beside the graph."""
    entries = {e.key: e.value for e in tensor.external_data}
    name, place = shown_line(tensor.name), entries.get("location", "")
    if file.directory is None:
        raise UsageError(
            f"{file.name}: the weight {name!r} lies in the file {shown_line(place)!r}, and a ModelProto does not say "
            "where that is: give the path of the .onnx file, or load the model with its external data"
        )
    if "\0" in place or any(len(part) > 255 for part in place.split("/")) or len(place) > 1024:
        raise UsageError(f"{file.name}: the weight {name!r} lies in {shown_line(place)!r}, which names no file")
    path = file.directory / place
    real = Path(os.path.realpath(path))  # resolve() stops at a link to itself
    homes = {file.directory.resolve(), (file.path or file.directory).resolve().parent}
    inside = not os.path.isabs(place) and ".." not in Path(place).parts and any(real.is_relative_to(h) for h in homes)
    if not place or not inside:
        raise UsageError(
            f"{file.name}: the weight {name!r} lies in {shown_line(place)!r}, outside of the model's folder: moeopt "
            "reads no data from elsewhere; put the data file beside the .onnx file"
        )
    if not real.is_file():
        raise UsageError(f"{file.name}: the weight {name!r} lies in {shown_line(place)!r}, which is not there")
    offset, length = (_whole(entries.get(key)) for key in ("offset", "length"))
    if -1 in (offset, length):
        raise UsageError(f"{file.name}: the weight {name!r} does not say where it begins and ends")
    return real, offset or 0, length


def external_tensors(graph: OnnxGraph) -> Iterator[Any]:
    """The tensors of a protobuf graph and of its bodies that lie in other files."""
    import onnx

    for tensor in (*graph.initializer, *tensors_in(graph.node)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def _whole(text: str | None) -> int | None:
    """A number in decimal digits; -1 for any other text, None for none."""
    if text is None:
        return None
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1


def _repeated(names: list[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""
