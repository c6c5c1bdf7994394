"""Groups in which some experts transform their input rows first (add, scale, gate): why only the rest is alike."""

from __future__ import annotations

from torch import fx

from moeopt.capture.op_kinds import is_pointwise, moves_rows, op_name, picks_rows
from moeopt.errors import Declined
from moeopt.recognise.ffn_candidates import FFNCandidate

_MOST_CALLS = 4
"""Longest chain of calls from the common rows to the rows that such an expert reads."""


def changed_rows(group: list[FFNCandidate], members: list[FFNCandidate]) -> Declined | None:
    """Why ``members`` alone are no whole group: the rest of ``group`` reads the same rows after a transformation.

    None where the rest reads other rows, and may be the experts of another block.
    """
    sources = {_origin(site.operand) for candidate in members for site in candidate.ins}
    rest = [c for c in group if c not in members]
    changes = [_first_change(c.ins[0].operand, sources) for c in rest]
    if len(sources) != 1 or not changes or any(node is None for node in changes):
        return None
    first = changes[0]
    assert first is not None, "checked above"
    subject = f"{len(rest)} of its {len(group)} experts read{'s' if len(rest) == 1 else ''} rows that are changed first"
    return Declined(
        f"{subject} ({op_name(first)}), where the others read them as they are, so that they do not all compute the "
        "same function of a row; where the change is a constant, fold it into that expert's first matrix and bias",
        first.meta.get("source", ""),
    )


def _origin(node: fx.Node) -> fx.Node:
    """The tensor whose rows ``node`` holds, before any selection or movement of rows."""
    while (picks_rows(node) or moves_rows(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _first_change(rows: fx.Node, sources: set[fx.Node]) -> fx.Node | None:
    """The last element-wise call on the path from one of the ``sources`` to ``rows``; None without such a path."""
    change: fx.Node | None = None
    for _ in range(_MOST_CALLS):
        if moves_rows(rows) and not picks_rows(rows) and rows.all_input_nodes:
            rows = rows.all_input_nodes[0]
            continue
        if not is_pointwise(rows):
            return None
        change = change or rows
        from_sources = [n for n in rows.all_input_nodes if _origin(n) in sources]
        if from_sources:
            return change
        if not rows.all_input_nodes:
            return None
        rows = rows.all_input_nodes[0]
    return None
