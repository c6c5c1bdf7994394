"""What an exported program writes at each call: an engine keeps no state from one call to the next."""

from __future__ import annotations

import torch
from torch.export.graph_signature import InputKind, OutputKind

from moeopt.errors import NotSaveableError


def refuse_read_state(program: torch.export.ExportedProgram) -> None:
    """Refuses what writes to an argument, or to a buffer that a result reads: an engine keeps no state."""
    read = read_buffers(program)
    what = {OutputKind.BUFFER_MUTATION: "its buffer", OutputKind.USER_INPUT_MUTATION: "its argument"}
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT or (spec.kind == OutputKind.BUFFER_MUTATION and spec.target not in read):
            continue
        raise NotSaveableError(
            f"the model writes to {what.get(spec.kind, spec.kind.name.lower())} {spec.target!r} as it runs, and an "
            "engine keeps no state: return the new value instead, or use backend='torch' without saving"
        )


def read_buffers(program: torch.export.ExportedProgram) -> set[str]:
    """The buffers whose value at the start of a call reaches a result; a counter that is only counted up does not."""
    (node,) = (n for n in program.graph.nodes if n.op == "output")
    signature = program.graph_signature
    todo = [
        value
        for value, spec in zip(node.args[0], signature.output_specs, strict=True)
        if spec.kind != OutputKind.BUFFER_MUTATION and isinstance(value, torch.fx.Node)
    ]
    seen: set[torch.fx.Node] = set()
    while todo:
        value = todo.pop()
        if value not in seen:
            seen.add(value)
            todo += value.all_input_nodes
    reached = {n.name for n in seen}
    return {
        s.target for s in signature.input_specs if s.kind == InputKind.BUFFER and s.arg.name in reached and s.target
    }


def written_by(program: torch.export.ExportedProgram) -> set[str]:
    """The paths of the weights and buffers that a call of ``program`` writes."""
    kinds = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    return {s.target for s in program.graph_signature.output_specs if s.kind in kinds and s.target}
