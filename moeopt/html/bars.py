"""Bars side by side, each with its name and its figure written out."""

from __future__ import annotations

from moeopt.html import svg
from moeopt.html.names import short_names

NAME, ROOM, FIGURE, ROW = 160.0, 190.0, 120.0, 26.0
CROSSED = 60.0


def bars(rows: list[tuple[str, float, str]], title: str, mark: tuple[float, str] | None = None) -> str:
    """Horizontal bars from zero: (name, value, its words); ``mark`` draws a line at a value, with its words."""
    most = max([value for _, value, _ in rows] + ([mark[0]] if mark else [])) or 1.0
    parts = []
    names = short_names([name for name, *_ in rows])
    for i, (name, (_, value, words)) in enumerate(zip(names, rows, strict=True)):
        top = i * ROW
        long = ROOM * value / most
        parts.append(svg.label(NAME - 8, top + 17, name, NAME - 8, "end"))
        over = " over" if mark is not None and value > mark[0] else ""
        parts.append(svg.tag("rect", x=NAME, y=top + 5, width=max(long, 1.0), height=ROW - 10, cls="bar" + over, rx=2))
        gap = ROOM * mark[0] / most - long if mark is not None else -1.0
        end = long + gap if 0 <= gap < CROSSED else long  # past the mark, where it would cross the words
        parts.append(svg.label(NAME + end + 6, top + 17, words, FIGURE))
    height = len(rows) * ROW
    if mark is not None:
        at = NAME + ROOM * mark[0] / most
        parts.append(svg.tag("path", d=f"M{at:.1f} 0V{height + 4:g}", cls="mark"))
        parts.append(svg.label(at, height + 17, mark[1], anchor="middle", cls="small"))
    return svg.picture(NAME + ROOM + FIGURE, height + (24 if mark else 2), title, parts, "bars")
