"""Speed and memory as the page shows them; what was not measured is not there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moeopt.errors import UsageError
from moeopt.html.bars import bars
from moeopt.sizes import in_three_figures

SHOWN = 24
"""Layers whose cost of imbalance is drawn: those where it is largest, or smallest below 1."""


_MEASURED = re.compile(r"([\w-]+), measured ([\d.e+-]+) ms")


def speed_view(
    timings: Mapping[str, float] | None, profile: Mapping[str, Any] | None, report: Mapping[str, Any] | None
) -> dict[str, str]:
    """Pictures, "" where nothing was measured.

    ``calls``: given timings. ``lowerings``: those that an engine chose from by measuring, as its blocks' reports say.
    ``balance``: the op as routed against balanced.
    """
    calls = ""
    if timings:
        for name, seconds in timings.items():
            if not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
                raise UsageError(f"timings[{name!r}] is {seconds!r}: give the seconds of one call")
        calls = bars(
            [(str(n), float(s), duration(s)) for n, s in timings.items()], "Time of one call, as it was measured"
        )
    timed = [x for x in (profile["layers"] if profile else []) if x["cost"]]
    far = sorted(timed, key=lambda x: -abs(x["cost"]["ratio"] - 1))[:SHOWN]
    rows = [
        (x["name"], x["cost"]["ratio"], f"{ratio(x['cost'])} ({duration(x['cost']['observed_seconds'])})")
        for x in timed
        if x in far
    ]
    title = "Time of the experts as routed, over the time with balanced routing; 1 is the same"
    chosen = [
        (f"{block['name']}: {name}", float(ms), f"{ms} ms")
        for block in (report["blocks"] if report else [])
        for name, ms in _MEASURED.findall(block["lowering"])
    ][:SHOWN]
    lowerings = bars(chosen, "Time of the lowerings that were measured for each block") if chosen else ""
    return {"calls": calls, "lowerings": lowerings, "balance": bars(rows, title, (1.0, "balanced")) if rows else ""}


def memory_view(inspection: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """The weights at each width against the device's memory: a picture, and the memory in words; None without."""
    if inspection is None:
        return None
    memory = inspection["memory"]
    rows = [
        (f"weights at {bits} bits", float(fit["bytes"]), in_three_figures(fit["bytes"]))
        for bits, fit in memory["bits"].items()
    ]
    device = memory["device"]
    mark, words = float(device["memory_bytes"]), f"{device['name']} has {in_three_figures(device['memory_bytes'])}"
    near = mark < 3 * rows[0][1]  # further away, the bars would vanish
    return bars(rows, f"Memory for the weights; {words}", (mark, device["name"]) if near else None), words


def ratio(cost: Mapping[str, Any]) -> str:
    """Time as routed over balanced; "~1" where equal timings differ by as much."""
    return "~1" if abs(cost["ratio"] - 1) <= cost["noise"] else f"{cost['ratio']:.2f}x"


def duration(seconds: float) -> str:
    """Seconds in three figures: 14.3 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
