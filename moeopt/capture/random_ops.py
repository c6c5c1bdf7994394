"""Draws of random numbers on a tape: whether they reach the result, and what to say of them."""

from __future__ import annotations

import torch

from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.capture.tree import leaves_of


def random_reason(tape: Tape, training: bool) -> str:
    """Why a forward that draws random numbers cannot be rewritten; "" when it draws none that matter."""
    drawn = tape.random_nodes()
    if not drawn:
        return ""
    wanted = ancestors([*leaves_of(torch.fx.Node, tape.output), *tape.mutations.values()])
    used = [n for n in drawn if n in wanted]
    if not used:
        return ""
    op = str(used[0].target).removeprefix("aten.").split(".")[0]
    line = used[0].meta.get("source", "")
    if training:
        return f"its forward is random in training mode ({op} at {line}): call model.eval() before optimising"
    return (
        f"its forward is random at inference ({op} at {line}), so no two runs agree; "
        "switch the noise off for inference and optimise again"
    )
