"""Which places of blocks lie in Python code that depends on the values of tensors: no graph repeats such code."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.find.block_candidates import BlockCandidate

_SHAPED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "_local_scalar_dense")


def mark_steered(tape: Tape, places: Iterable[BlockCandidate]) -> None:
    """Say of each place which module's Python asks for values: of experts the block, of a dense FFN its own module or
    the one that calls it (an early exit between layers)."""
    readers = {read.call for read in tape.reads}
    for place in places:
        whole = place.levels[place.own - 1]
        if place.kind != "moe":
            asking = next((level.path for level in place.levels[:2] if level.index in readers), None)
        elif any(whole.index in tape.stack(call) for call in readers):
            asking = whole.path
        else:
            asking = whole.path if any(map(_shaped_by_values, tape.nodes[whole.first : whole.last])) else None
        place.steered = asking


def _shaped_by_values(node: fx.Node) -> bool:
    if op_name(node) in _SHAPED_BY_VALUES:
        return True
    masks = node.all_input_nodes[1:] if op_name(node) == "index" else []
    return any(mask.meta.get("dtype") == torch.bool for mask in masks)
