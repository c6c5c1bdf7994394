"""Draws of random numbers on a tape: whether they reach the result, and what to say of them."""

from __future__ import annotations

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.recorded import Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.obstacles import Rank


def refuse_random(tape: Tape, training: bool) -> None:
    """Nothing where the forward draws no random numbers that matter.

    Raises:
        Declined: it does, so that no rewritten block could be checked against it.
    """
    if reason := random_reason(tape, training):
        raise Declined(reason, draws_that_matter(tape)[0].meta.get("source", ""), Rank.FORBIDS)


def random_reason(tape: Tape, training: bool) -> str:
    """Why a forward that draws random numbers cannot be rewritten; "" when it draws none that matter."""
    used = draws_that_matter(tape)
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


def draws_that_matter(tape: Tape) -> list[fx.Node]:
    """Draws that a result depends on; noise that the code multiplies by the number 0 (``* self.training``) is none."""
    drawn = tape.random_nodes()
    results = leaves_of(fx.Node, [tape.output, list(tape.mutations.values())])
    return reached_draws(tape.nodes, drawn, results) if drawn else []


def reached_draws(nodes: list[fx.Node], drawn: list[fx.Node], results: list[fx.Node]) -> list[fx.Node]:
    """Those of ``drawn`` that ``results`` depend on, nodes of one graph in order."""
    zero = _zero_by_code(nodes)
    wanted: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in wanted and node not in zero:
            wanted.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in drawn if n in wanted]


def leave_out_idle_noise(nodes: list[fx.Node]) -> None:
    """Add the number 0 in the place of noise that the code multiplies by the number 0: ``x + noise * self.training``.

    Only where what is added has the shape and the dtype of the sum, which the other operand then has as well.
    """
    if not any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in nodes):
        return
    zero = _zero_by_code(nodes)
    for node in nodes:
        if op_name(node) not in ("add", "sub") or len(node.args) != 2:
            continue
        for own, other in ((0, 1), (1, 0)) if op_name(node) == "add" else ((0, 1),):
            kept, noise = node.args[own], node.args[other]
            if noise not in zero or not isinstance(kept, fx.Node) or kept in zero:
                continue
            if _kind(kept) == _kind(node) == _kind(noise):
                node.args, node.kwargs = (kept, 0), {}
                break


def _kind(node: object) -> tuple[object, object]:
    assert isinstance(node, fx.Node)
    return node.meta.get("shape"), node.meta.get("dtype")


def _zero_by_code(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that are 0 whatever finite numbers go in: products with the Python number 0, and copies of them."""
    zero: set[fx.Node] = set()
    for node in nodes:
        if op_name(node) == "mul":
            if any(a in zero if isinstance(a, fx.Node) else a == 0 for a in node.args):
                zero.add(node)
        elif op_name(node) in _KEEP_ZERO and node.args[0] in zero:
            zero.add(node)
    return zero


_KEEP_ZERO = {"view", "reshape", "_unsafe_view", "t", "transpose", "permute", "select", "slice", "unsqueeze", "squeeze",
              "expand", "clone", "_to_copy", "detach", "alias", "neg"}  # fmt: skip
