"""Calls on a tape that exchange tensors with other processes: a rewritten block would compute without them."""

from __future__ import annotations

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.obstacles import Rank


def refuse_collectives(tape: Tape) -> None:
    """Nothing where the forward stays in its own process.

    Raises:
        Declined: it calls a collective, which one process alone cannot be checked for.
    """
    for node in tape.nodes:
        if str(node.target).startswith(("c10d.", "_c10d_functional.")):
            raise Declined(
                f"its forward exchanges tensors with other processes ({op_name(node).rstrip('_')}), and a block is "
                "checked in one process; optimise it without the group, then distribute it, or leave it as it is",
                node.meta.get("source"),
                Rank.FORBIDS,
            )
