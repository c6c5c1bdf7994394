"""The load of every expert of every layer as a heat map, on a scale of the mean: below it blue, above it orange.

A layer is one row. Neighbours of one colour are one stroke, so 60 layers of 512 experts stay small. Above ``BY_NUMBER``
experts a row is sorted by load: a cell is too small to be looked up, and expert 7 of two layers have nothing in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeopt.html import svg
from moeopt.html.names import short_names

LEVELS = ((0.25, "under 0.25"), (0.5, "under 0.5"), (0.8, "under 0.8"), (1.25, "0.8 to 1.25"), (2, "under 2"),
          (4, "under 4"), (float("inf"), "4 and more"))  # fmt: skip
"""Load over the mean load: the upper end of each colour, and its words."""
BY_NUMBER = 64
WIDE = 660.0
GUTTER = 150.0


def heat_map(layers: list[dict[str, Any]]) -> str:
    """``layers`` as in the JSON of a load profile; "" when no layer has any load."""
    rows = [layer for layer in layers if any(layer["fired"])]
    if not rows:
        return ""
    num_columns = max(len(layer["fired"]) for layer in rows)
    cell = min(max(WIDE / num_columns, 1.3), 26.0)
    height = 20.0 if len(rows) <= 24 else 13.0
    names = short_names([layer["name"] for layer in rows])
    parts = []
    for i, (layer, name) in enumerate(zip(rows, names, strict=True)):
        top = 18 + i * height
        at = layer["imbalance"]
        told = f"{layer['name']}: busiest {at['max_over_mean']:.2f} x the mean, {len(at['dead'])} dead"
        text = svg.label(GUTTER - 8, top + height / 2 + 4, name, GUTTER - 12, "end", "small" if height < 15 else "")
        fired = layer["fired"] if num_columns <= BY_NUMBER else sorted(layer["fired"], reverse=True)
        parts.append(svg.group([text, *_row(fired, top, cell, height)], told))
    bottom = 18 + len(rows) * height
    parts += [svg.tag("rect", x=GUTTER, y=18, width=cell * num_columns, height=bottom - 18, cls="frame")]
    parts += list(_axis(num_columns, cell, "expert" if num_columns <= BY_NUMBER else "rank"))
    order = "" if num_columns <= BY_NUMBER else ", each row sorted by load"
    title = (
        f"Heat map: load of {num_columns} experts (columns{order}) in {len(rows)} layer{'s' * (len(rows) != 1)} (rows)"
        ", as a multiple of the layer's mean; the same figures are in the table"
    )
    return svg.picture(GUTTER + cell * num_columns + 12, bottom + 8, title, parts, "heat")


def levels() -> list[tuple[str, str]]:
    """(class, words) of each colour, for the legend."""
    return [("dead", "never fired"), *((f"l{i}", words) for i, (_, words) in enumerate(LEVELS))]


def _row(fired: list[int], top: float, cell: float, height: float) -> Iterator[str]:
    mean = sum(fired) / len(fired)
    strokes: dict[str, list[str]] = {}
    start = 0
    for e in range(1, len(fired) + 1):
        here = _level(fired[start], mean)
        if e < len(fired) and _level(fired[e], mean) == here:
            continue
        strokes.setdefault(here, []).append(f"M{GUTTER + start * cell:.1f} {top:g}h{(e - start) * cell:.1f}v{height:g}"
                                            f"h{-(e - start) * cell:.1f}z")  # fmt: skip
        start = e
    yield from (svg.tag("path", d="".join(d), cls=name) for name, d in strokes.items())


def _level(count: int, mean: float) -> str:
    return "dead" if not count else f"l{next(i for i, (end, _) in enumerate(LEVELS) if count < end * mean)}"


def _axis(num_columns: int, cell: float, word: str) -> Iterator[str]:
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 20) if s * cell >= 26)
    for e in range(0, num_columns, step):
        yield svg.label(GUTTER + (e + 0.5) * cell, 13, str(e), anchor="middle", cls="small")
    yield svg.label(GUTTER - 8, 13, word, anchor="end", cls="small")
