"""Experts that do not all read the rows as they are: one of them adds to its rows, scales or gates them first."""

from __future__ import annotations

from torch import fx

from moeopt.capture.op_kinds import is_pointwise, moves_rows, op_name, picks_rows
from moeopt.errors import Declined
from moeopt.recognise.ffn_candidates import FFNCandidate

_FEW = 4
"""Calls between a row as it is and as the expert reads it."""


def changed_rows(group: list[FFNCandidate], members: list[FFNCandidate]) -> Declined | None:
    """The reason where ``members`` read rows as they are, and the others of a ``group`` read the same rows, changed.

    None where the others read something else: they may be experts of another block.
    """
    sources = {_unmoved(site.operand) for candidate in members for site in candidate.ins}
    others = [c for c in group if c not in members]
    changes = [_change(c.ins[0].operand, sources) for c in others]
    if len(sources) != 1 or not changes or any(node is None for node in changes):
        return None
    first = changes[0]
    assert first is not None, "each of them was found"
    many = (
        f"{len(others)} of its {len(group)} experts read{'s' if len(others) == 1 else ''} rows that are changed first"
    )
    return Declined(
        f"{many} ({op_name(first)}), where the others read them as they are, so that they do not all compute the same "
        "function of a row; where the change is a constant, fold it into that expert's first matrix and bias",
        first.meta.get("source", ""),
    )


def _unmoved(node: fx.Node) -> fx.Node:
    """The tensor whose rows these are, picked and moved or not."""
    while (picks_rows(node) or moves_rows(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _change(rows: fx.Node, sources: set[fx.Node]) -> fx.Node | None:
    """The element-wise call behind which ``rows`` are those of one of the ``sources``; None where there is none."""
    found: fx.Node | None = None
    for _ in range(_FEW):
        if moves_rows(rows) and not picks_rows(rows) and rows.all_input_nodes:
            rows = rows.all_input_nodes[0]
            continue
        if not is_pointwise(rows):
            return None
        found = found or rows
        wide = [n for n in rows.all_input_nodes if _unmoved(n) in sources]
        if wide:
            return found
        if not rows.all_input_nodes:
            return None
        rows = rows.all_input_nodes[0]
    return None
