"""How a traced model is called, as JSON: its arguments, its result, and the sizes that must agree."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from moeopt.engine import sizes
from moeopt.engine.conditions import encode_conditions
from moeopt.engine.graph import input_entry, tree_of
from moeopt.engine.values import encode
from moeopt.errors import NotSaveableError


def describe_call(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """What :class:`moeopt.engine.binding.Binding` reads, and ``outputs``: one entry per leaf of the result.

    An output is ``{"tensor": n}``, the n-th output of the graph, or ``{"constant": value}``. ``conditions`` are what
    the trace took for granted about sizes. The least size is 1: ONNX Runtime reduces empty tensors to wrong shapes.

    Raises:
        NotSaveableError: a structure that cannot be rebuilt, or a program that writes to its arguments or buffers.
    """
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    pairs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    inputs = [input_entry(node) for node, spec in pairs if spec.kind == InputKind.USER_INPUT]
    symbols = {d for i in inputs for d in i.get("shape", []) if isinstance(d, str)}
    ranges = sizes.encode_ranges(program.range_constraints, symbols)
    return {
        "parameters": list(program.module_call_graph[0].signature.forward_arg_names or []),
        "in_tree": tree_of(program.call_spec.in_spec, "the inputs hold"),
        "out_tree": tree_of(program.call_spec.out_spec, "the result holds"),
        "inputs": inputs,
        "sizes": dict.fromkeys(sorted(symbols), [1, None]) | {s: [max(1, low or 0), high] for s, (low, high) in ranges.items()},
        "conditions": encode_conditions(program._guards_code, _numbered(program)),
        "outputs": _outputs(program),
    }


def _numbered(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """The arguments by name, each leaf its number."""
    spec = program.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(range(spec.num_leaves), spec)
    names = program.module_call_graph[0].signature.forward_arg_names or []
    return dict(zip(names, args, strict=False)) | kwargs


def _outputs(program: torch.export.ExportedProgram) -> list[dict[str, Any]]:
    (node,) = (n for n in program.graph.nodes if n.op == "output")
    found: list[dict[str, Any]] = []
    tensors = 0
    for value, spec in zip(node.args[0], program.graph_signature.output_specs, strict=True):
        if spec.kind != OutputKind.USER_OUTPUT:
            what = {OutputKind.BUFFER_MUTATION: "its buffer", OutputKind.USER_INPUT_MUTATION: "its argument"}
            raise NotSaveableError(
                f"the model writes to {what.get(spec.kind, spec.kind.name.lower())} {spec.target!r} as it runs, and an "
                "engine keeps no state: return the new value instead, or use backend='torch'"
            )
        if isinstance(value, torch.fx.Node):
            found.append({"tensor": tensors})
            tensors += 1
            if not isinstance(value.meta.get("val"), torch.Tensor):
                raise NotSaveableError(f"the result holds {value.name}, a size of the inputs: return tensors only")
        else:
            found.append({"constant": encode(value)})
    return found


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with no op that writes to its arguments."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec", FutureWarning)  # torch's own use of it
        return program.run_decompositions({})
