"""Clamps and thresholds that no probe reaches: no value shows them, so they are read off the tape.

A clamp at 65504 between the experts' outputs and their sum changes nothing on likely rows. Followed by value, the rows
are the same before and after, and the rewrite would leave the clamp out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import fx

from moeopt.capture.op_kinds import is_factory, moves_rows, op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.same_graph import same_call
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.value_types import FxArg, FxTarget

_CLAMPS = ("clamp", "clamp_min", "clamp_max", "hardtanh", "minimum", "maximum", "fmin", "fmax", "threshold")
_COMPARES = ("gt", "lt", "ge", "le")
_CHOOSING = ("where", "masked_fill")


def limits_values(tape: Tape, node: fx.Node) -> bool:
    """True where ``node`` changes floats beyond a bound that is not 0, or saturates; a bound of 0 shows on any row."""
    name = op_name(node)
    if name == "tanh":
        return True
    if name in _COMPARES:
        return (
            _is_float(node.args[0]) and any(op_name(u) in _CHOOSING for u in node.users) and _bounds(tape, node) != []
        )
    return name in _CLAMPS and _is_float(node) and _bounds(tape, node) != []


class UnreachedLimit(Declined):
    """A limit that no probe reaches, which the op would leave out."""


def check_limits(
    tape: Tape, end: fx.Node, kept: Iterable[fx.Node], fitted: set[fx.Node], source: str | None = None
) -> None:
    """Raise :class:`UnreachedLimit` for a limit that ``end`` is computed through and the rewrite leaves out.

    Args:
        end: the experts' sum.
        kept: what the rewrite computes it from.
        fitted: nodes between experts' matmuls, whose function was compared beyond their bounds.
    """
    limits = {n for n in tape.nodes if n not in fitted and limits_values(tape, n)}
    if not limits:
        return
    kept, seen, stack = set(kept), set[fx.Node](), [end]
    while stack:
        node = stack.pop()
        if node in seen or node in kept or any(same_call(node, other) for other in kept):
            continue
        seen.add(node)
        if node.meta.get("dtype") is None or _is_float(node):  # what flags and ids are computed from is the router's
            sized = node.args[:1] if is_factory(node) else ()
            like = next(filter(_is_float, sized), None)  # no value of what zeros_like is given is read
            stack.extend(n for n in node.all_input_nodes if n is not like)
    for node in sorted(limits & seen, key=lambda n: n.meta["index"]):
        bounds = ", ".join(f"{bound:g}" for bound in _bounds(tape, node))
        raise UnreachedLimit(
            f"its forward limits values with {op_name(node)}{f' ({bounds})' if bounds else ''} between the tokens and "
            "the sum of its experts, where no probe reaches the limit, so the op would leave it out: limit the tokens "
            "before they are dispatched, the block's result, or values between an expert's two matmuls",
            node.meta.get("source") or source,
        )


def magnitudes(tape: Tape, nodes: Iterable[fx.Node]) -> list[float]:
    """How large values must be to lie beyond every bound and constant that ``nodes`` read, largest last."""
    nodes = list(nodes)
    own = set(nodes)
    found = {abs(b) for n in nodes for b in _constants(tape, n, own)}
    return sorted(f for f in found if 10 < f < 1e30)


def _is_float(node: FxArg) -> bool:
    dtype = node.meta.get("dtype") if isinstance(node, fx.Node) else None
    return dtype is not None and dtype.is_floating_point


def _bounds(tape: Tape, node: fx.Node) -> list[float]:
    return [b for b in _constants(tape, node, {a for a in node.all_input_nodes[:1]}) if b != 0]


def _constants(tape: Tape, node: fx.Node, but: set[fx.Node]) -> Iterator[float]:
    """Numbers among the operands of ``node``, and the largest of each float tensor that does not come from tokens.

    Of what an op that moves rows is given, a value to fill with is such a number; a place, a size or a dimension is
    none. A loop over tokens picks each by its place, and each number costs the caller one more run of that loop.
    """
    kinds = _kinds(node.target) if moves_rows(node) else None
    operands: Iterable[tuple[int | str, FxArg]] = (*enumerate(node.args), *node.kwargs.items())
    for at, a in operands:
        if isinstance(a, (int, float)) and not isinstance(a, bool):
            if kinds is None or "number" in kinds.get(at, ""):
                yield float(a)
        elif isinstance(a, fx.Node) and a not in but and _is_float(a):
            if not any(n.op == "placeholder" for n in ancestors([a])):
                value = tape.value(a)
                yield _largest(value.detach())
            elif op_name(node) in _CLAMPS:
                yield torch.inf


@cache
def _kinds(target: FxTarget) -> dict[int | str, str]:
    """The type of each argument of an op, by its position and by its name; none where it has no schema."""
    schema = getattr(target, "_schema", None)
    arguments = schema.arguments if schema is not None else ()
    return {key: str(a.type) for i, a in enumerate(arguments) for key in (i, a.name)}


def _largest(value: torch.Tensor) -> float:
    """The largest finite size in a tensor, which may be a stack of weights: no copy where all of it is finite."""
    if not value.numel():
        return 0.0
    low, high = (float(end) for end in value.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    return float(value.abs().nan_to_num(0, 0, 0).max())
