"""Experts whose result for one place of a sequence is made of what they gave for the place before.

    h = a[:, t] * h + b[:, t];  y[t] = c(h)          a loop of Python over places, as of a selective scan
    nn.GRU, nn.LSTM, nn.RNN                          the same in one module

Looked for only to say why a block is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import reduce

from torch import fx, nn

from moeopt.capture.op_kinds import is_pointwise, moves_rows, op_name
from moeopt.capture.tape import Call, Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.obstacles import Rank

_PLACES = 3
"""Places of one dimension, read one by one, from which on a loop can be told: the third reads what the second made of
what the first gave."""
_ADDS = ("add", "sub", "sum")


def recurrence(tape: Tape, experts: Collection[nn.Module]) -> Declined | None:
    """The reason for ``experts``, modules of lists whose Parameters have the same shapes, where one is recurrent."""
    recurrent = next((c for c in tape.calls if isinstance(c.module, nn.RNNBase)), None)
    if recurrent is not None and _within_rows(tape, recurrent, experts):
        return Declined(
            f"its experts are recurrent ({type(recurrent.module).__name__} at {recurrent.path}): each token's row is a "
            "sequence of its own there, whose places are computed one after another, which is none of the calls that "
            "the op makes on all rows of an expert at once; this block stays as it is",
            rank=Rank.FORBIDS,
        )
    if recurrent is not None:
        return Declined(
            f"its experts are recurrent ({type(recurrent.module).__name__} at {recurrent.path}), so a token's result "
            "depends on the tokens before it; only functions of each token's own row are grouped",
            rank=Rank.FORBIDS,
        )
    for call in tape.calls:
        of_tape = tape.nodes[call.first : call.last]
        node = _loop(of_tape, rows_given(tape, call.index, experts)) if call.module in experts else None
        if node is not None:
            return Declined(
                "its experts are recurrent (a Python loop over the places of a sequence, each of which reads what the "
                "one before gave), so a token's result depends on the tokens before it; only functions of each token's "
                "own row are grouped, so this block stays as it is",
                node.meta.get("source"),
                rank=Rank.FORBIDS,
            )
    return None


def _within_rows(tape: Tape, recurrent: Call, experts: Collection[nn.Module]) -> bool:
    """Whether each sequence that a layer reads is made of one row of what its expert was given."""
    read = next(iter(leaves_of(fx.Node, recurrent.args)), None)
    batch = 0 if recurrent.module.batch_first else 1
    shape = read.meta["shape"] if read is not None else ()
    return len(shape) == 3 and shape[batch] == rows_given(tape, recurrent.index, experts)


def rows_given(tape: Tape, index: int, experts: Collection[nn.Module]) -> int:
    """How many rows of one vector each the expert around the call at ``index`` was given; -1 where it reads others."""
    around = next((c for i in tape.stack(index) if (c := tape.calls[i]).module in experts), None)
    given = [] if around is None else leaves_of(fx.Node, around.args)
    return given[0].meta["shape"][0] if given and len(given[0].meta["shape"]) == 2 else -1


def _loop(nodes: list[fx.Node], rows: int) -> fx.Node | None:
    """What one place of a dimension other than the features' makes of two before it, in the ``nodes`` of an expert;
    none of places within each of the ``rows``, which are a function of that row."""
    places: dict[tuple[fx.Node, int], dict[int, list[fx.Node]]] = {}
    for node in nodes:
        if op_name(node) != "select" or not isinstance(node.args[0], fx.Node):
            continue
        base, dim, index = node.args[0], int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
        while op_name(base) == "slice" and base.meta["shape"] == base.args[0].meta["shape"]:  # type: ignore[union-attr]
            base = base.args[0]  # type: ignore[assignment]
        shape = base.meta["shape"]
        if dim % len(shape) < len(shape) - 1 and not (dim % len(shape) > 0 and shape[0] == rows):
            places.setdefault((base, dim), {}).setdefault(index, []).append(node)
    for read in places.values():
        found = _carried(nodes, read) if len(read) >= _PLACES else None
        if found is not None:
            return found
    return None


def _carried(nodes: list[fx.Node], read: dict[int, list[fx.Node]]) -> fx.Node | None:
    """The first value in which a place meets what two places before it gave, by more than a sum of what each gave."""
    of = {n: 1 << i for i, at in enumerate(sorted(read)) for n in read[at]}
    bent = set[fx.Node]()  # of several places, and no sum of values of one each
    for node in nodes:
        parts = {a: of[a] for a in node.all_input_nodes if a in of}
        if node in of or not parts:
            continue
        of[node] = reduce(operator.or_, parts.values())
        several = [a for a, part in parts.items() if part.bit_count() > 1]
        changes = not moves_rows(node) and op_name(node) not in _ADDS
        meets = any(parts[a] != of[node] and (changes or a in bent) for a in several)
        if meets and is_pointwise(node):
            return node
        if several and (changes or not bent.isdisjoint(several)):
            bent.add(node)
    return None
