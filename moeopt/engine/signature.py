"""How a traced model is called, as JSON: its arguments, its result, and the sizes that must agree."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind

from moeopt.engine import sizes
from moeopt.engine.graph import input_entry, tree_of
from moeopt.engine.values import encode
from moeopt.errors import NotSaveableError


def describe_call(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """What :class:`moeopt.engine.binding.Binding` reads, and ``outputs``: one entry per leaf of the result.

    An output is ``{"tensor": n}``, the n-th output of the graph, or ``{"constant": value}``.

    Raises:
        NotSaveableError: a structure that cannot be rebuilt, or a program that writes to its arguments or buffers.
    """
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    pairs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    inputs = [input_entry(node) for node, spec in pairs if spec.kind == InputKind.USER_INPUT]
    symbols = {d for i in inputs for d in i.get("shape", []) if isinstance(d, str)}
    return {
        "parameters": list(program.module_call_graph[0].signature.forward_arg_names or []),
        "in_tree": tree_of(program.call_spec.in_spec, "the inputs hold"),
        "out_tree": tree_of(program.call_spec.out_spec, "the result holds"),
        "inputs": inputs,
        "sizes": sizes.encode_ranges(program.range_constraints, symbols),
        "outputs": _outputs(program),
    }


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
