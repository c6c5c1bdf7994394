"""Does the code around the experts carry rows as they are, however large? Asked by running it.

    rows into an expert = the tokens' rows (times a weight)      sum = linear in the experts' outputs

The rewrite leaves this code out, so whatever else it does to rows would be lost: a mask of large values, a soft
limit, a rounding, a repair of infinite rows. On likely rows such code changes nothing, and it may be written with
any op. So it runs again in float64 on rows of many sizes, with the routing as it was, and must answer in proportion.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors, replay
from moeopt.capture.same_graph import same_call
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.limits import magnitudes

_SIZES = (1e-6, 1e4)
_BEYOND = 64
"""By how much rows exceed a number that the code reads: a norm or a mean of a row lies beyond as well."""
_NEAR = 1e-7
"""Relative, in float64."""


def check_rows_carried(
    tape: Tape, tokens: fx.Node, entries: Iterable[fx.Node], outs: Iterable[fx.Node], end: fx.Node,
    kept: Iterable[fx.Node], source: str | None = None,
) -> None:  # fmt: skip
    """Raise ``Declined`` where ``tokens`` reach ``entries``, or ``outs`` reach ``end``, otherwise than in proportion.

    Args:
        tokens: the rows that the experts are said to read.
        entries: what the experts' first calls read.
        outs: the experts' outputs.
        end: their sum.
        kept: what the rewrite computes from other values, the routing above all; all that leads there is as recorded.
    """
    outs, entries = list(outs), list(dict.fromkeys(entries))
    again = [n for n in tape.nodes if n is not tokens and n.op == "call_function" and same_call(n, tokens)]
    moved = {tokens, *again, *outs}
    nodes = _moved_by(tape.nodes[: end.meta["index"] + 1], moved, list(kept))
    nodes = _needed(nodes, [end, *entries])
    if not nodes:
        return
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(n.meta["shape"], generator=generator, dtype=torch.float64) for n in (tokens, *outs)}
    base.update(dict.fromkeys(again, base[tokens]))
    watched = [end, *(n for n in entries if n in moved)]

    def at(size: float) -> list[torch.Tensor]:
        values = replay(tape, nodes, {n: (v * size).to(tape.value(n).device) for n, v in base.items()}, torch.float64)
        return [values[n] if n in values else tape.value(n).double() for n in watched]

    def slope(size: float) -> list[torch.Tensor]:
        return [(b - a) / size for a, b in zip(at(size), at(2 * size), strict=True)]

    want = slope(1.0)
    for size in (*_SIZES, *(_BEYOND * m for m in magnitudes(tape, nodes))):
        for one, other in zip(want, slope(size), strict=True):
            scale = one[one.isfinite()].abs().max() if one.isfinite().any() else torch.tensor(0.0)
            if not bool(((one - other).abs() <= _NEAR * scale).logical_or(~one.isfinite()).all()):
                raise _declined(nodes, f"rows {size:g} times as large", source)
    for one, broken in zip(want, at(torch.inf), strict=True):
        if bool(((one != 0) & broken.isfinite()).any()):
            raise _declined(nodes, "infinite rows", source)


def _moved_by(nodes: list[fx.Node], moved: set[fx.Node], kept: list[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes`` that are computed from ``moved``, to which they are added, and not for ``kept``."""
    fixed, found = ancestors(kept), []
    for node in nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node in moved or node in fixed or random or not any(a in moved for a in node.all_input_nodes):
            continue
        if not any(same_call(node, other) for other in kept):  # the routing, computed anew for each expert
            moved.add(node)
            found.append(node)
    return found


def _needed(nodes: list[fx.Node], targets: list[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes`` that lead to ``targets`` through one another."""
    own, seen = set(nodes), set[fx.Node]()
    stack = [t for t in targets if t in own]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(a for a in node.all_input_nodes if a in own)
    return [n for n in nodes if n in seen]


def _declined(nodes: list[fx.Node], rows: str, source: str | None) -> Declined:
    names = ", ".join(dict.fromkeys(op_name(n) for n in nodes))
    return Declined(
        f"the code between the tokens and the sum of its experts ({names}) does to {rows} something else than to those "
        "of the probes, so the op, which carries rows as they are, would leave it out: do it to the tokens before they "
        "are dispatched, to the block's result, or between an expert's two matmuls",
        source,
    )
