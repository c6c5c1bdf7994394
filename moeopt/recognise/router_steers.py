"""Nothing but the router may decide on what a block's Python does, and on which rows its experts see."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.bool_reads import is_assertion
from moeopt.capture.isolated_run import undone
from moeopt.capture.op_kinds import is_factory, op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape, clone_inputs
from moeopt.capture.tree import tree_map
from moeopt.errors import Declined
from moeopt.recognise.routing_types import Routing

CHOICES = ("topk", "argmax", "argmin", "sort", "argsort", "max", "min", "kthvalue", "multinomial")


def only_the_router_steers(
    tape: Tape, routing: Routing, tables: set[fx.Node], dispatch: set[fx.Node], tokens: fx.Node
) -> None:
    """Values that Python reads, and which rows dispatch picks, may depend on the input through the routing alone.

    Raises:
        Declined: the forward turns another value into a Python number, so it may branch on it.
    """
    cut = {node for r in (routing.ids, routing.weights) if r is not None for node in r.nodes} | tables
    steered = _steered(tape, cut)
    for node, line, _ in tape.reads:
        dtype = node.meta.get("dtype")
        if steered.get(node, False) or (dtype is not None and dtype.is_floating_point and _varies(node)):
            if dtype == torch.bool and _asserted(tape, line):
                continue
            source = node.args[0] if node.target is operator.getitem and isinstance(node.args[0], fx.Node) else node
            if _is_check_of_one_hot(tape, source):
                continue
            raise Declined(becomes_a_number(source), line or None)

    before = ancestors([tokens, *cut])
    for node in dispatch - before:
        by = node.args[1] if op_name(node) == "masked_select" else node  # what it selects from is no choice
        if op_name(node) in ("nonzero", "masked_select", "unique_consecutive", "_unique2") and steered.get(by, False):  # type: ignore[arg-type]
            raise Declined(
                f"which rows its experts see depends on more than the tensors that hold the routing ({op_name(node)})",
                node.meta.get("source"),
            )


def becomes_a_number(node: fx.Node) -> str:
    """The reason for a block whose Python reads ``node``, and the way out."""
    way_out = "keep it in a tensor (torch.where)"
    if op_name(node) == "aminmax":
        way_out = "where that is F.one_hot(ids, n), which looks at its ids, write ids[..., None] == torch.arange(n)"
    elif op_name(node) == "any":
        way_out = (
            "where that skips an expert which no row of the example inputs reaches, give example inputs that reach "
            f"every expert; else {way_out}"
        )
    return (
        f"its forward turns a value computed from the input into a Python number ({op_name(node)}) and may branch on "
        f"it, which a graph cannot repeat; {way_out}"
    )


def _steered(tape: Tape, cut: set[fx.Node]) -> dict[fx.Node, bool]:
    """Which nodes depend on the input by another way than through ``cut`` and choices."""
    steered: dict[fx.Node, bool] = {}
    for node in tape.nodes:
        chosen = op_name(node) in CHOICES or (node.target is operator.getitem and op_name(node.args[0]) in CHOICES)  # type: ignore[arg-type]
        integer = not getattr(node.meta.get("dtype"), "is_floating_point", True)
        if node in cut or (chosen and integer) or is_factory(node):  # zeros_like reads a shape
            steered[node] = False
        else:
            steered[node] = node.op == "placeholder" or any(steered.get(a, False) for a in node.all_input_nodes)
    return steered


def _is_check_of_one_hot(tape: Tape, bounds: fx.Node) -> bool:
    """Whether ``F.one_hot`` itself asks for the ``bounds`` of what it codes, right before it does: it raises, or goes
    on."""
    if op_name(bounds) != "aminmax":
        return False
    after = tape.nodes[tape.nodes.index(bounds) + 1 :]
    made = next((n for n in after if n.target is not operator.getitem and op_name(n) != "_local_scalar_dense"), None)
    if made is None or op_name(made) not in ("zeros", "new_zeros"):
        return False
    coded = [u for u in made.users if op_name(u) == "scatter" and u.args[0] is made and u.args[3] == 1]
    return any(op_name(u.args[2]) == "unsqueeze" and u.args[2].args[0] is bounds.args[0] for u in coded)  # type: ignore[union-attr, arg-type]


def _asserted(tape: Tape, line: str) -> bool:
    """Whether what Python reads at ``line`` of the block's code is an assertion, which gives no numbers."""

    def run(mode: TorchDispatchMode) -> None:
        args, kwargs = clone_inputs(tree_map(fx.Node, tape.value, (tape.args, tape.kwargs)))
        with undone(tape.root) as watched, watched, mode:
            tape.root(*args, **kwargs)

    return is_assertion(run, line)


def _varies(node: fx.Node) -> bool:
    return any(n.op == "placeholder" for n in ancestors([node]))
