"""Whether the parts of E experts lie at constant distances from one another, so that they are one stacked tensor."""

from __future__ import annotations

from typing import Any

from moeopt.ir.weight_refs import ExpertRef, MatrixRef
from moeopt.value_types import PyObject


def flat(part: PyObject) -> list[tuple[int, ...]]:
    return [p for p in (part if isinstance(part, list) else [part]) if p is not None]


def _step(parts: list[Any]) -> tuple[int, ...] | None | bool:
    """The constant distance from one part to the next; None where all are absent, False where there is none."""
    first = parts[0]
    if first is None:
        return None if all(p is None for p in parts) else False
    if any(p is None or p.path != first.path or p.dm != first.dm for p in parts):
        return False
    if isinstance(first, MatrixRef) and any(p.dk != first.dk for p in parts):
        return False
    if len(parts) == 1:
        return tuple(0 for _ in first.origin)
    step = tuple(b - a for a, b in zip(first.origin, parts[1].origin, strict=True))
    places = [tuple(o + e * s for o, s in zip(first.origin, step, strict=True)) for e in range(len(parts))]
    return step if places == [p.origin for p in parts] else False


def steps_between(experts: list[ExpertRef]) -> tuple[Any, Any, Any, Any] | None:
    """The constant distance between expert e and e+1 in each part, or None where there is none."""
    if any(x.neurons is not None for x in experts) or len({x.w_out.k for x in experts}) > 1:
        return None

    w_in = [_step([x.w_in[i] for x in experts]) for i in range(len(experts[0].w_in))]
    b_in = [_step([x.b_in[i] for x in experts]) for i in range(len(experts[0].b_in))]
    w_out, b_out = _step([x.w_out for x in experts]), _step([x.b_out for x in experts])
    if any(s is False for s in (*w_in, *b_in, w_out, b_out)):
        return None
    return w_in, b_in, w_out, b_out
