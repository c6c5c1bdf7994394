"""An ``ExportedProgram`` as JSON: inputs, weights, one line per op, results, and what is written back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from moeopt.bundle import op_allowlist as allow
from moeopt.bundle import simplify
from moeopt.bundle import symbols as sizes
from moeopt.bundle.caches import cache_reason
from moeopt.bundle.tree import encode_tree
from moeopt.bundle.unrolled import is_row_function, unrolled
from moeopt.bundle.values import encode
from moeopt.errors import BundleError, NotSaveableError
from moeopt.patches import one_trace, quicker_decomposition, quiet
from moeopt.value_types import PyObject

SCHEMA = 1
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def write_graph(program: torch.export.ExportedProgram) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """``(graph, tensors)``: JSON types only, and the weights that it reads by name.

    ``NotSaveableError`` names the op, the weight or the input structure in the way.
    """
    if program.dialect == "TRAINING":  # its ops may write to their arguments
        with one_trace, quiet(), quicker_decomposition():  # torch warns about its own use of tree specs
            program = program.run_decompositions({})
    inputs, weights, tensors = _inputs(program)
    graph: dict[str, Any] = {
        "schema": SCHEMA,
        "parameters": list(program.module_call_graph[0].signature.forward_arg_names or []),
        "in_tree": tree_of(program.call_spec.in_spec, "the inputs hold"),
        "out_tree": tree_of(program.call_spec.out_spec, "the result holds"),
        "inputs": inputs,
        "weights": weights,
    }
    names = _Names(program, weights, tensors)
    graph["nodes"] = list(_nodes(program, names))
    graph["outputs"], graph["write_back"] = _outputs(program, names)
    symbols = {d for i in inputs for d in i.get("shape", []) if isinstance(d, str)}
    graph["sizes"] = sizes.encode_ranges(program.range_constraints, symbols)
    names.forget_unread(graph)
    return graph, tensors


class _Names:
    """The name under which each node's value is found in the JSON, and which weights are read by name."""

    def __init__(self, program: PyObject, weights: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        written = {s.target for s in program.graph_signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION}
        self.weights, self.tensors = weights, tensors
        self.fixed = {placeholders[n]: tensors[t] for n, t in weights.items() if t not in written}
        self.read: set[str] = set()
        self._names: dict[str, str] = {name: name for name in placeholders}

    def __call__(self, node: torch.fx.Node) -> str:
        self.read.add(self._names[node.name])
        return self._names[node.name]

    def same(self, node: torch.fx.Node, source: torch.fx.Node) -> None:
        self._names[node.name] = self._names[source.name]
        if source in self.fixed:
            self.fixed[node] = self.fixed[source]

    def add(self, node: torch.fx.Node, view: torch.Tensor | None = None) -> None:
        self._names[node.name] = node.name
        if view is not None:
            key = f"{self.weights[self._names[node.all_input_nodes[0].name]]}|{node.name}"
            self.weights[node.name], self.tensors[key], self.fixed[node] = key, view, view

    def forget_unread(self, graph: dict[str, Any]) -> None:
        """Drop the weights that are read through views only."""
        kept = self.read | {w["into"] for w in graph["write_back"]}
        for name in [n for n in self.weights if n not in kept]:
            self.tensors.pop(self.weights.pop(name))


def tree_of(spec: PyObject, what: str) -> PyObject:
    """A structure as JSON; ``NotSaveableError`` begins with ``what`` when a bundle could not rebuild it."""
    try:
        return encode_tree(spec)
    except TypeError as err:
        if cache := re.search(r"\btransformers\.cache_utils\.(\w+)", str(err)):  # once some export has registered it
            raise NotSaveableError(cache_reason(cache[1])) from None
        raise NotSaveableError(f"{what} {err}: a bundle cannot rebuild it; wrap the model to pass plain ones") from None


def _inputs(program: PyObject) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, torch.Tensor]]:
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    inputs: list[dict[str, Any]] = []
    weights: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    written = {s.target for s in program.graph_signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION}
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(input_entry(node))
        elif spec.kind in _WEIGHTS:
            if node.users or spec.target in written:
                weights[node.name] = spec.target
                tensors[spec.target] = _weight(program, spec.target)
        elif node.users:
            raise NotSaveableError(f"the graph reads {spec.target!r}, a {spec.kind.name.lower()}: not a tensor")
    return inputs, weights, tensors


def _weight(program: PyObject, name: str) -> torch.Tensor:
    source: Mapping[str, Any] = program.state_dict if name in program.state_dict else program.constants
    tensor = source.get(name)
    if not isinstance(tensor, torch.Tensor):
        raise NotSaveableError(f"the weight {name!r} is a {type(tensor).__name__}, not a tensor")
    return tensor


def input_entry(node: torch.fx.Node) -> dict[str, Any]:
    """One leaf of the arguments: a tensor's dtype, device and sizes, a number's type, or a constant."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return {
            "name": node.name,
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": str(value.device),
            "shape": [sizes.encode_dim(d) for d in value.shape],
        }
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return {"name": node.name, "number": type(value).__name__.removeprefix("Sym").lower()}
    try:
        return {"name": node.name, "constant": encode(value)}
    except TypeError as err:
        raise NotSaveableError(f"the input {node.name!r} is {err}") from None


def _nodes(program: PyObject, names: _Names) -> Iterator[dict[str, Any]]:
    """One entry for each node that computes something."""
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output") or simplify.computes_nothing(node):
            continue
        source, view = simplify.same_as(node), simplify.view_of_weight(node, names.fixed)
        if source is not None:
            names.same(node, source)
            continue
        names.add(node, view)
        if view is None and is_row_function(node):
            try:
                yield from unrolled(node, names)
            except (BundleError, TypeError) as err:
                raise NotSaveableError(f"the experts {node.name} cannot be saved{_source(node)}: {err}") from None
        elif view is None:
            yield _node(node, names)


def _node(node: torch.fx.Node, names: _Names) -> dict[str, Any]:
    if node.op == "get_attr":
        user = next(iter(node.users), None)
        what = f"the op {user.target}" if user is not None else f"the attribute {node.target}"
        raise NotSaveableError(f"{what} runs a sub-graph ({node.target}){_source(node)}: a bundle holds one flat graph")
    source = node.args[0] if node.target is torch.ops.aten.as_strided.default else None
    if isinstance(source, torch.fx.Node) and source.name in names.weights:
        raise NotSaveableError(
            f"the op {node.target} reads the storage of {names.weights[source.name]!r} at sizes known at run time "
            f"only{_source(node)}: a bundle's storages are not the model's"
        )
    try:
        out = {
            "op": allow.name_of(node.target),
            "args": encode(node.args, names),
            "out": node.name,
        }
        if node.kwargs:
            out["kwargs"] = {k: encode(v, names) for k, v in node.kwargs.items()}
    except (BundleError, TypeError) as err:
        raise NotSaveableError(f"the op {node.target} ({node.name}) cannot be saved{_source(node)}: {err}") from None
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        out["is"] = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(d) for d in value.shape)}]"
    return out


def _source(node: torch.fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return f" ({lines[-1]})" if lines else ""


def _outputs(program: PyObject, names: _Names) -> tuple[list[Any], list[dict[str, str]]]:
    (node,) = (n for n in program.graph.nodes if n.op == "output")
    outputs: list[Any] = []
    write_back: list[dict[str, str]] = []
    weights = {s.target: n for n, s in _named_specs(program)}
    for value, spec in zip(node.args[0], program.graph_signature.output_specs, strict=True):
        if spec.kind == OutputKind.USER_OUTPUT:
            outputs.append(encode(value, names))
        elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            into = weights.get(spec.target, spec.target)
            write_back.append({"from": names(value), "into": into})
        elif isinstance(spec.arg, TensorArgument):
            raise NotSaveableError(f"the graph's result {spec.arg.name!r} is a {spec.kind.name.lower()}")
    return outputs, write_back


def _named_specs(program: PyObject) -> list[tuple[str, Any]]:
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    pairs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    return [(n.name, s) for n, s in pairs if s.kind in _WEIGHTS]
