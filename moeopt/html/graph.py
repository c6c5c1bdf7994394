"""One block before and after: the captured calls with a branch for each expert, and the program that runs now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeopt.html import svg

WIDE, BOX, GAP = 330.0, 26.0, 16.0
BRANCHES = 4
"""Branches that are drawn; the third stands for those that are not."""
LONGEST = 7
"""Calls of a branch that are drawn."""


def captured(graph: dict[str, Any]) -> str:
    """The block as the trace saw it."""
    seen = graph["captured"]
    down = _Down()
    down.box("tokens", "end")
    down.box(f"router: {_calls(seen['router'])}" if seen["router"] else "routed outside of this module", "router")
    if seen["dispatch"]:
        down.box(f"dispatch: {_calls(seen['dispatch'])}", "gone", ", ".join(seen["dispatch_names"]))
    down.branches(seen["branches"], seen["branch"])
    down.box("result", "end")
    title = (
        f"{graph['block']} as captured: {seen['calls']} calls, of which {seen['router']} route and {seen['dispatch']} "
        f"dispatch; {_expert(seen)}"
    )
    return svg.picture(WIDE, down.y, title, down.parts, "graph")


def rewritten(graph: dict[str, Any]) -> str:
    """The block's program: its router and surroundings as they were, and one op."""
    down = _Down()
    down.box("tokens", "end")
    steps = graph["rewritten"]
    for i, step in enumerate(_shortened(steps)):
        if step != "moeopt::experts":
            down.box(step, "router" if "moeopt::experts" in steps[i:] else "plain")
            continue
        top = f", top-{graph['top_k']}" if graph["top_k"] else ""
        down.box(f"moeopt::experts ({graph['experts']} experts{top})", "op", graph["function"])
    down.box("result", "end")
    title = f"{graph['block']} rewritten: {len(steps)} steps: {', '.join(steps)}"
    return svg.picture(WIDE, down.y, title, down.parts, "graph")


def _expert(seen: dict[str, Any]) -> str:
    chain = ", ".join(seen["branch"])
    many = seen["branches"]
    return f"{many} times the chain {chain}" if many > 1 else f"all experts together in {chain}"


def _shortened(steps: list[str], limit: int = 14) -> list[str]:
    """The steps next to the op, where there are too many to draw."""
    if len(steps) <= limit:
        return steps
    at = steps.index("moeopt::experts")
    first = max(0, min(at - limit // 2, len(steps) - limit))
    shown = steps[first : first + limit]
    before, after = first, len(steps) - first - limit
    return [*([f"{before} steps before"] if before else []), *shown, *([f"{after} steps after"] if after else [])]


def _calls(n: int) -> str:
    return f"{n} call{'' if n == 1 else 's'}"


class _Down:
    """Boxes one under the other, joined by arrows."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = 4.0

    def box(self, text: str, cls: str, under: str = "") -> None:
        """A box over the whole width, below what is there; ``under`` is a second line."""
        if self.parts:
            self._arrow(WIDE / 2, self.y, self.y + GAP)
            self.y += GAP
        high = BOX + (16 if under else 0)
        self.parts.append(svg.tag("rect", x=20, y=self.y, width=WIDE - 40, height=high, rx=5, cls=f"box {cls}"))
        self.parts.append(svg.label(WIDE / 2, self.y + 17, text, WIDE - 56, "middle"))
        if under:
            self.parts.append(svg.label(WIDE / 2, self.y + 33, under, WIDE - 50, "middle", "small"))
        self.y += high + (4 if cls == "end" and len(self.parts) > 2 else 0)

    def branches(self, many: int, chain: list[str]) -> None:
        """The experts side by side, first, second, ..., last; one column where they are computed together."""
        shown = list(chain[:LONGEST]) + (["…"] if len(chain) > LONGEST else [])
        columns = list(_columns(many))
        wide = (WIDE - 40) / len(columns)
        top, start = self.y + GAP + 18, self.y
        for c, number in enumerate(columns):
            x = 20 + c * wide + wide / 2
            self._arrow(x, start, start + GAP, from_x=WIDE / 2)
            word = "…" if number is None else f"expert {number}" if many > 1 else "all experts"
            self.parts.append(svg.label(x, top - 4, word, wide, "middle", "small"))
            for r, op in enumerate(shown if number is not None else []):
                y = top + r * (BOX - 2)
                self.parts.append(svg.tag("rect", x=x - wide / 2 + 4, y=y, width=wide - 8, height=BOX - 6, rx=3,
                                          cls="box gone"))  # fmt: skip
                self.parts.append(svg.label(x, y + 14, op, wide - 12, "middle", "small"))
        self.y = top + len(shown) * (BOX - 2)

    def _arrow(self, x: float, top: float, bottom: float, from_x: float | None = None) -> None:
        start = x if from_x is None else from_x
        self.parts.append(svg.tag("path", d=f"M{start:g} {top:g}L{x:g} {bottom - 3:g}", cls="arrow"))
        self.parts.append(svg.tag("path", d=f"M{x - 4:g} {bottom - 6:g}L{x:g} {bottom:g}L{x + 4:g} {bottom - 6:g}z",
                                  cls="head"))  # fmt: skip


def _columns(many: int) -> Iterator[int | None]:
    """Numbers of the branches to draw; None is a gap."""
    if many <= BRANCHES:
        yield from range(many or 1)
        return
    yield from (0, 1, None, many - 1)
