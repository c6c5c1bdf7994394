"""A layer's load in words, for the page's tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeopt.html.numbers import duration
from moeopt.listed import listed

FEW = 16
"""Experts that are named of a list."""


def load_views(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers of a load profile, each with ``busiest`` for its row and ``facts``: labelled sentences."""
    return [{**layer, "busiest": _busiest(layer["fired"], 2), "facts": list(_facts(layer))} for layer in layers]


def _facts(layer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    at = layer["imbalance"]
    if at is None:
        return
    yield "busiest", _busiest(layer["fired"], 8)
    yield "dead", _some(at["dead"]) + f"; {at['by_chance']['dead']:.1f} if tokens chose at random"
    yield "hot", _some(at["hot"])
    pairs = (f"{p['experts'][0]} + {p['experts'][1]}: {p['over_mean']:.1f}x the mean pair" for p in layer["pairs"])
    yield "pairs", ", ".join(pairs) or "no token has two experts"
    for name, words in (("mass", "sum of a token's weights"), ("share", "its first expert's part"),
                        ("margin", "its first expert over its second")):  # fmt: skip
        seen = layer["confidence"][name]
        if seen is not None:
            figures = ", ".join(f"{k} {v:.3f}" for k, v in seen.items())
            yield name, f"{words}: {figures}"
    fired = sum(layer["fired"])
    yield (
        "slots",
        f"{layer['slots']} slots of {layer['tokens']} tokens in {layer['calls']} calls: {fired} fired, "
        f"{layer['negative']} with an id below 0, {layer['beyond']} beyond the experts, "
        f"{layer['zero_weight']} of weight 0",
    )
    if layer["cost"]:
        c = layer["cost"]
        yield (
            "cost",
            f"{duration(c['observed_seconds'])} for {c['tokens']:.0f} tokens on {c['experts_hit_observed']:.0f} "
            f"experts; balanced {duration(c['balanced_seconds'])} on {c['experts_hit_balanced']:.0f}; equal timings "
            f"differ by {100 * c['noise']:.0f} %",
        )


def _busiest(fired: list[int], limit: int) -> str:
    total = sum(fired)
    top = sorted(range(len(fired)), key=lambda e: -fired[e])[:limit]
    return ", ".join(f"{e}: {100 * fired[e] / total:.1f} %" for e in top if fired[e]) if total else ""


def _some(experts: list[int]) -> str:
    return listed(experts, FEW) or "none"
