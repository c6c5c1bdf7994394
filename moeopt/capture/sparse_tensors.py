"""Sparse and nested tensors on a tape: their entries have no places that could be followed."""

from __future__ import annotations

from moeopt.capture.tape import Tape
from moeopt.errors import Declined


def refuse_sparse(tape: Tape) -> None:
    """``Declined`` where a call of the tape made a sparse or a nested tensor."""
    for node in tape.nodes:
        if (kind := node.meta.get("layout")) is None:
            continue
        if kind == "nested":
            raise Declined(
                "its forward makes a nested tensor, whose rows cannot be followed; multiply each expert's rows by "
                "themselves (a loop over rows.split(counts)), or pad them to one tensor",
                node.meta.get("source", ""),
            )
        raise Declined(
            f"its forward makes a sparse tensor ({kind}), whose rows cannot be followed; gather and add up rows "
            "with index_select and index_add, or multiply by a dense matrix",
            node.meta.get("source", ""),
        )
