"""Indices that are places among others, as a TopK or an ArgMax gives them: none of them counts from the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeopt.onnx_in.program import NodeStep

_READ_AT = {"Gather": 1, "GatherElements": 1, "ScatterElements": 1, "OneHot": 0}
"""By the operator which of its inputs are indices."""
_MAKES = {"TopK": 1, "ArgMax": 0, "ArgMin": 0, "NonZero": 0}
"""By the operator which of its outputs are places."""
_SAME_NUMBERS = frozenset(
    ("Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
)
_WHOLE = (6, 7)
"""INT32 and INT64, which hold each place: a Cast to fewer bits may make one of them negative."""


def from_zero_told(steps: Sequence[NodeStep]) -> list[NodeStep]:
    """The steps, those with the attribute ``from_zero`` that are given places for indices."""
    places: set[str] = set()
    told = []
    for step in steps:
        if step.domain == "" and step.op_type in _MAKES:
            places.add(step.outputs[_MAKES[step.op_type]])
        elif step.domain == "" and step.op_type in _SAME_NUMBERS and step.inputs[0] in places:
            if step.op_type != "Cast" or step.attributes.get("to") in _WHOLE:
                places.add(step.outputs[0])
        at = _READ_AT.get(step.op_type, len(step.inputs)) if step.domain == "" else len(step.inputs)
        if at < len(step.inputs) and step.inputs[at] in places:
            step = replace(step, attributes={**step.attributes, "from_zero": 1})
        told.append(step)
    return told
