"""Check by running it that the dispatch and combine code is linear in the rows at every magnitude.

    rows into an expert = the tokens' rows (times a weight)      sum = linear in the experts' outputs

The rewrite replaces this code, so any other effect on rows would be lost: a mask of large values, a soft limit, a
rounding, a repair of infinite rows. Such an effect may be written with any op, and changes nothing on typical rows. So
the code is replayed in float64 on rows of several magnitudes, with the recorded routing, and must scale with them.
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
"""Factor by which rows exceed a constant in the code, so that a norm or mean of a row exceeds the constant too."""
_NEAR = 1e-7
"""Relative, in float64."""


def check_rows_carried(
    tape: Tape, tokens: fx.Node, entries: Iterable[fx.Node], outs: Iterable[fx.Node], end: fx.Node,
    kept: Iterable[fx.Node], source: str | None = None,
) -> None:  # fmt: skip
    """Raise ``Declined`` where ``entries`` are not linear in ``tokens``, or ``end`` is not linear in ``outs``.

    Args:
        tokens: the rows that were recognised as the experts' input.
        entries: the operands of the experts' first calls.
        outs: the experts' outputs.
        end: their sum.
        kept: what the rewrite still computes, the routing above all; its inputs keep their recorded values.
    """
    outs, entries = list(outs), list(dict.fromkeys(entries))
    recomputed = [n for n in tape.nodes if n is not tokens and n.op == "call_function" and same_call(n, tokens)]
    carried = {tokens, *recomputed, *outs}
    nodes = _carried_by(tape.nodes[: end.meta["index"] + 1], carried, list(kept))
    nodes = _needed(nodes, [end, *entries])
    if not nodes:
        return
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(n.meta["shape"], generator=generator, dtype=torch.float64) for n in (tokens, *outs)}
    base.update(dict.fromkeys(recomputed, base[tokens]))
    watched = [end, *(n for n in entries if n in carried)]

    def at(size: float) -> list[torch.Tensor]:
        values = replay(tape, nodes, {n: (v * size).to(tape.value(n).device) for n, v in base.items()}, torch.float64)
        return [values[n] if n in values else tape.value(n).double() for n in watched]

    def slope(size: float) -> list[torch.Tensor]:
        return [(b - a) / size for a, b in zip(at(size), at(2 * size), strict=True)]

    expected = slope(1.0)
    for size in (*_SIZES, *(_BEYOND * m for m in magnitudes(tape, nodes))):
        for reference, actual in zip(expected, slope(size), strict=True):
            scale = reference[reference.isfinite()].abs().max() if reference.isfinite().any() else torch.tensor(0.0)
            if not bool(((reference - actual).abs() <= _NEAR * scale).logical_or(~reference.isfinite()).all()):
                raise _declined(nodes, f"rows {size:g} times as large", source)
    for reference, beyond in zip(expected, at(torch.inf), strict=True):
        if bool(((reference != 0) & beyond.isfinite()).any()):
            raise _declined(nodes, "infinite rows", source)


def _carried_by(nodes: list[fx.Node], carried: set[fx.Node], kept: list[fx.Node]) -> list[fx.Node]:
    """The ``nodes`` that depend on ``carried`` and that ``kept`` does not depend on; each is added to ``carried``."""
    fixed, found = ancestors(kept), []
    for node in nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node in carried or node in fixed or random or not any(a in carried for a in node.all_input_nodes):
            continue
        if not any(same_call(node, other) for other in kept):  # the routing, computed anew for each expert
            carried.add(node)
            found.append(node)
    return found


def _needed(nodes: list[fx.Node], targets: list[fx.Node]) -> list[fx.Node]:
    """The ``nodes`` on a path within ``nodes`` to one of the ``targets``."""
    within, seen = set(nodes), set[fx.Node]()
    stack = [t for t in targets if t in within]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(a for a in node.all_input_nodes if a in within)
    return [n for n in nodes if n in seen]


def _declined(nodes: list[fx.Node], rows: str, source: str | None) -> Declined:
    names = ", ".join(dict.fromkeys(op_name(n) for n in nodes))
    return Declined(
        f"the code between the tokens and the sum of its experts ({names}) does to {rows} something else than to those "
        "of the probes, so the op, which carries rows as they are, would leave it out: do it to the tokens before they "
        "are dispatched, to the block's result, or between an expert's two matmuls",
        source,
    )
