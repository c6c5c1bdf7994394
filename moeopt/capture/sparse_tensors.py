"""Sparse tensors on a tape: their entries have no places that could be followed."""

from __future__ import annotations

from moeopt.capture.tape import Tape
from moeopt.errors import Declined


def refuse_sparse(tape: Tape) -> None:
    """``Declined`` where a call of the tape made a sparse tensor."""
    for node in tape.nodes:
        if "layout" in node.meta:
            kind = str(node.meta["layout"]).removeprefix("torch.")
            raise Declined(
                f"its forward makes a sparse tensor ({kind}), whose rows cannot be followed; gather and add up rows "
                "with index_select and index_add, or multiply by a dense matrix",
                node.meta.get("source", ""),
            )
