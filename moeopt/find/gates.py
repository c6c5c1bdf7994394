"""What weighs the parts of a mixture: a softmax, a sigmoid, or a table that is zeros but where a choice put numbers."""

from __future__ import annotations

import math

from torch import fx

from moeopt.capture.op_kinds import CHOICES_AMONG, GATES, is_pointwise, moves_rows, op_name
from moeopt.find.module_lists import made_by

_PUT = ("scatter", "scatter_add")
_MASKS = ("where", "masked_fill", *_PUT)
_STEPS = 256
"""Calls that are looked at on the way from a lookup to a choice."""


def size_of(gate: fx.Node) -> tuple[int, int]:
    """Over how many things a softmax, a sigmoid or a table is, and for how many rows; (0, 0) of another call. A softmax
    over the chosen is over all that were chosen among."""
    axis = -1 if op_name(gate) == "sigmoid" else gate.args[1] if op_name(gate) in GATES else None
    shape = gate.meta.get("shape") or ()
    if (choice := choice_of_table(gate)) is not None and shape:  # it may have a row for each of those chosen
        scores = choice.all_input_nodes[0].meta["shape"]
        return shape[-1], math.prod(scores) // max(1, scores[-1])
    if op_name(gate) in CHOICES_AMONG:
        shape, axis = gate.all_input_nodes[0].meta["shape"], -1
    if not shape or not isinstance(axis, int) or not shape[axis]:
        return 0, 0
    chosen = chosen_among(gate) if op_name(gate) in GATES and axis in (-1, len(shape) - 1) else 0
    return chosen or shape[axis], math.prod(shape) // shape[axis]


def chosen_among(gate: fx.Node) -> int:
    """Among how many things a choice took what the ``gate`` is over; 0 where none did."""
    node = gate.all_input_nodes[0] if gate.all_input_nodes else gate
    for _ in range(8):
        if op_name(node) in CHOICES_AMONG:
            return int(node.all_input_nodes[0].meta["shape"][-1])
        if not moves_rows(node) or not node.all_input_nodes:
            return 0
        node = node.all_input_nodes[0]
    return 0


def leaves_out(gate: fx.Node) -> bool:
    """Whether a gate is zeros but for what was chosen."""
    if op_name(gate) in GATES:
        scores = gate.all_input_nodes[0]
        return op_name(scores) in _MASKS and made_by(scores, CHOICES_AMONG) is not None
    return choice_of_table(gate) is not None or op_name(gate) in CHOICES_AMONG


def choice_of_table(node: fx.Node) -> fx.Node | None:
    """The choice that says where something is put into zeros, or ones into a row for each chosen."""
    name, given = op_name(node), node.all_input_nodes
    if len(given) < 2 or name not in (*_PUT, "eq"):
        return None
    return made_by(given[0 if name == "eq" else 1], CHOICES_AMONG)


def chooser_of(lookup: fx.Node) -> fx.Node | None:
    """The choice by whose ids ``lookup`` picks, moved and cast on the way."""
    if op_name(lookup) not in ("gather", "index", "index_select", "take_along_dim"):
        return None
    queue = lookup.all_input_nodes[1:]
    for node in queue:  # it grows
        if op_name(node) in CHOICES_AMONG:
            return node
        if len(queue) < _STEPS and (moves_rows(node) or is_pointwise(node)):
            queue.extend(a for a in node.all_input_nodes if a not in queue)
    return None
