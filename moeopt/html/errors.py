"""Rounding on a logarithmic axis: each block's distances against its budget, and how all cases spread."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from moeopt.html import svg
from moeopt.html.names import short_names
from moeopt.value_types import PyObject

NAME, ROOM, ROW, RIGHT = 160.0, 400.0, 20.0, 30.0
BINS = 8
"""Columns in a decade."""
SHOWN = 40
"""Blocks that are drawn: those that needed most of their budget."""


def distances(blocks: list[dict[str, Any]]) -> str:
    """For each block, the worst token's distance from the oracle: of the original, of the rewrite, and the budget.

    Args:
        blocks: ``name``, ``original``, ``rewritten``, ``budget``, ``required``; zero and non-finite distances stand
            at the end of the axis.
    """
    shown = sorted(blocks, key=lambda b: -_finite(b["required"]))[:SHOWN]
    shown = [b for b in blocks if b in shown]
    axis = _Axis([b[k] for b in shown for k in ("original", "rewritten", "budget")])
    parts = list(axis.draw(18, 18 + len(shown) * ROW))
    for i, (b, name) in enumerate(zip(shown, short_names([b["name"] for b in shown]), strict=True)):
        y = 18 + i * ROW + ROW / 2
        told = (
            f"{b['name']}: original {_words(b['original'])}, rewritten {_words(b['rewritten'])}, budget "
            f"{_words(b['budget'])}"
        )
        x0, x1, x2 = (axis.at(b[k]) for k in ("original", "rewritten", "budget"))
        parts.append(
            svg.group(
                [
                    svg.label(NAME - 10, y + 4, name, NAME - 14, "end"),
                    svg.tag("path", d=f"M{min(x0, x1):.1f} {y:g}H{x2:.1f}", cls="thread"),
                    svg.tag("path", d=f"M{x2:.1f} {y - 7:g}V{y + 7:g}", cls="budget"),
                    svg.tag("circle", cx=round(x0, 1), cy=y, r=5, cls="original"),
                    svg.tag("circle", cx=round(x1, 1), cy=y, r=3.5, cls="rewritten"),
                ],
                told,
            )
        )
    some = f"the {SHOWN} blocks that needed most" if len(blocks) > SHOWN else f"{len(blocks)} blocks"
    title = f"Distance from the float64 oracle for {some}: original, rewritten, and budget; the table has the figures"
    return svg.picture(NAME + ROOM + RIGHT, 36 + len(shown) * ROW, title, parts, "errors")


def spread(original: list[float], rewritten: list[float]) -> str:
    """How many cases lie in each eighth of a decade, original above the line, rewritten below; "" without any."""
    both = [_finite(v) for v in (*original, *rewritten)]
    if not any(v > 0 for v in both):
        return ""
    axis = _Axis(both)
    counts: list[dict[int, int]] = [{}, {}]
    for side, values in zip(counts, (original, rewritten), strict=True):
        for v in values:
            bin_ = math.floor(BINS * axis.log(v))
            side[bin_] = side.get(bin_, 0) + 1
    most = max(n for side in counts for n in side.values())
    middle, tall = 84.0, 60.0
    parts = list(axis.draw(18, 150))
    for side, sign, name in ((counts[0], -1, "original"), (counts[1], 1, "rewritten")):
        parts.append(svg.label(NAME - 10, middle + sign * 30 + 4, name, NAME, "end"))
        for bin_, n in side.items():
            x0, x1 = axis.place(bin_ / BINS), axis.place((bin_ + 1) / BINS)
            high = max(tall * n / most, 1.5)
            top = middle - high if sign < 0 else middle
            told = f"{name}: {n} cases between {10 ** (bin_ / BINS):.1e} and {10 ** ((bin_ + 1) / BINS):.1e}"
            parts.append(svg.tag("rect", title=told, x=round(x0 + 0.5, 1), y=round(top, 1), width=round(x1 - x0 - 1, 1),
                                 height=round(high, 1), cls=f"column {name}"))  # fmt: skip
    parts.append(svg.tag("path", d=f"M{NAME:g} {middle:g}H{NAME + ROOM:g}", cls="axis"))
    title = f"How the worst distances of {len(rewritten)} cases spread: at most {most} of them alike"
    return svg.picture(NAME + ROOM + RIGHT, 170, title, parts, "errors")


class _Axis:
    """Decades from the least to the largest positive value; what is zero stands at the left end."""

    def __init__(self, values: list[Any]) -> None:
        logs = [math.log10(v) for v in map(_finite, values) if v > 0] or [-8.0]
        self.low, self.high = math.floor(min(logs)), math.floor(max(logs)) + 1

    def log(self, value: PyObject) -> float:
        number = _finite(value)
        return min(max(math.log10(number), self.low), self.high - 1e-9) if number > 0 else float(self.low)

    def place(self, log: float) -> float:
        return NAME + ROOM * (log - self.low) / (self.high - self.low)

    def at(self, value: PyObject) -> float:
        return self.place(self.log(value))

    def draw(self, top: float, bottom: float) -> Iterator[str]:
        for decade in range(self.low, self.high + 1):
            x = self.place(decade)
            yield svg.tag("path", d=f"M{x:.1f} {top:g}V{bottom:g}", cls="grid")
            yield svg.label(x, bottom + 14, f"1e{decade}", anchor="middle", cls="small")


def _finite(value: PyObject) -> float:
    """A distance as a number; what is not finite as a large one."""
    number = float(value)
    return number if math.isfinite(number) else 1e3


def _words(value: PyObject) -> str:
    return f"{float(value):.1e}"
