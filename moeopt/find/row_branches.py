"""Alike submodules that run side by side on the same rows and are weighed: experts of any function of a row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from moeopt.capture.op_kinds import WEIGH, op_name
from moeopt.capture.replay import ancestors, between, descendants
from moeopt.capture.tape import Call, Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.recognise.row_flow import features_axis
from moeopt.recognise.row_graph import RowGraphReader


def weighed_branches(tape: Tape, ran: Sequence[Call], same_sizes: bool = True) -> bool:
    """Whether the calls ``ran`` are one function of a row with two matmuls or more, over weights of their own, and
    their results are multiplied by something else that is computed from the input, or one of them is taken for each row
    by a condition on it. Heads of an attention mix rows.

    Unless ``same_sizes``, functions of several widths are one where they make the same calls.
    """
    texts, ends = set(), []
    for call in ran:
        starts, results = (
            list(dict.fromkeys(leaves_of(fx.Node, [x]))) for x in ((call.args, call.kwargs), call.output)
        )
        if len(starts) != 1 or len(results) != 1 or starts[0].meta.get("shape") is None:
            return False
        try:
            inside = set(between(tape, starts, results[0]))
            axis = features_axis(starts[0], inside, [u for u in starts[0].users if u in inside])
            graph = RowGraphReader(tape, starts[0], results[0], inside, values=False, axis=axis)
        except Declined:
            return False
        texts.add(graph.text if same_sizes else str([str(op) for op, _, _ in graph.nodes]))
        body = RowFunction(graph.text).body
        ends += results
    if len(texts) != 1 or body.products() < 2:
        return False
    after = descendants(tape, ends)
    inside = {*after, *ends}
    for node in after:
        others = [a for a in node.all_input_nodes if a not in inside]
        if op_name(node) in WEIGH and any(n.op == "placeholder" for n in ancestors(others)):
            return True
    return _taken_by_conditions(after, inside, len(ran))


def _taken_by_conditions(after: Sequence[fx.Node], inside: set[fx.Node], branches: int) -> bool:
    """Whether ``torch.where`` takes one of the branches' results for each row: a condition of the input for each of
    them, but for the last; padding that is masked is one for all of them."""
    conditions = set[fx.Node]()
    for node in after:
        if op_name(node) != "where" or len(node.args) < 3 or not isinstance(node.args[0], fx.Node):
            continue
        condition, between_two = node.args[0], all(v in inside for v in node.args[1:])
        if any(n.op == "placeholder" for n in ancestors([condition])) and (branches > 2 or between_two):
            conditions.add(condition)
    return len(conditions) >= max(1, branches - 1)
