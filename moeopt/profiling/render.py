"""A load profile as text of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moeopt.html import ratio
from moeopt.listed import listed
from moeopt.profiling.statistics import HOT

if TYPE_CHECKING:
    from moeopt.profiling.result import LayerLoad, LoadProfile

WIDTH = 80
NAME = 24
SHOWN = 4
"""Layers whose experts are shown one by one: the most uneven ones."""
BARS = "▁▂▃▄▅▆▇█"
HEADER = f"{'block':<{NAME}} experts  tokens max/mean    cv entropy dead  hot  cost"
LEGEND = (
    "max/mean: load of the busiest expert over the mean; cv: standard deviation over mean; entropy: 1 is balance, 0 "
    f"one expert for all; dead: experts that never fired; hot: above {HOT:g} times the mean; cost: time of the op as "
    "routed over that with balanced routing, measured here; ~1: no difference beyond the noise"
)


def lines(profile: LoadProfile) -> Iterator[str]:
    """Line by line: the table, the most uneven layers, what could not be read, notes."""
    layers, unread = len(profile.layers), len(profile.unread)
    yield from _wrapped(f"moeopt profile: {profile.model or 'model'}")
    tokens = max((layer.tokens for layer in profile.layers), default=0)
    yield (
        f"{_many(profile.batches, 'batch', 'es')}, {tokens:,} tokens; {_many(layers, 'block')} profiled, {unread} not "
        f"({profile.seconds:.1f} s)"
    )
    if profile.layers:
        yield ""
        yield HEADER
        for layer in profile.layers:
            yield from _row(layer)
        yield from _wrapped(LEGEND, "  ")
    uneven = sorted((x for x in profile.layers if x.imbalance), key=lambda x: -float(x.imbalance["cv"]))  # type: ignore[index]
    for layer in uneven[:SHOWN]:
        yield ""
        yield from _details(layer)
    if len(uneven) > SHOWN:
        yield from _wrapped(f"the {SHOWN} most uneven of {len(uneven)} layers; --json has all")
    for layer in profile.layers:
        if layer.unseen:
            yield from _wrapped(
                f"{layer.name}: {_many(layer.unseen, 'call')} not counted, it ran its original code: {layer.why_unseen}"
            )
    for block in profile.unread:
        yield ""
        yield from _wrapped(f"not profiled: {block.name}")
        yield from _wrapped(block.reason, "    ", "why     ")
        if block.source:
            yield from _wrapped(block.source, "    ", "source  ")
    for note in profile.notes:
        yield from _wrapped(f"note: {note}")


def _row(layer: LayerLoad) -> Iterator[str]:
    if len(layer.name) > NAME:
        yield from _wrapped(layer.name)
    name = layer.name if len(layer.name) <= NAME else ""
    start = f"{name:<{NAME}} {layer.experts:>7} {layer.tokens:>7}"
    at = layer.imbalance
    if at is None:
        yield f"{start}  no expert fired"
        return
    cost = ratio(layer.cost) if layer.cost else "-"
    yield (
        f"{start} {at['max_over_mean']:>8.2f} {at['cv']:>5.2f} {at['entropy']:>7.3f} {len(at['dead']):>4} "
        f"{len(at['hot']):>4} {cost:>5}"
    )


def _details(layer: LayerLoad) -> Iterator[str]:
    at: dict[str, Any] = layer.imbalance or {}
    yield from _wrapped(layer.name)
    for label, text in facts(layer, at):
        yield from _wrapped(text, "    ", f"{label:<8}")


def facts(layer: LayerLoad, at: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Labelled sentences about one layer's experts."""
    if layer.experts <= 64:
        yield "load", "".join(_bar(n, max(layer.fired)) for n in layer.fired)
    chance = at["by_chance"]
    yield "uneven", f"cv {at['cv']:.2f}; {chance['cv']:.2f} if tokens chose at random, with {chance['dead']:.1f} dead"
    busiest = sorted(range(layer.experts), key=lambda e: -layer.fired[e])[:4]
    fired = sum(layer.fired)
    yield "busiest", ", ".join(f"{e}: {100 * layer.fired[e] / fired:.1f} %" for e in busiest)
    if at["dead"]:
        yield "dead", listed(at["dead"], 12)
    if at["hot"]:
        yield "hot", listed(at["hot"], 12)
    idle = {"id below 0": layer.negative, "id beyond the experts": layer.beyond, "weight 0": layer.zero_weight}
    if any(idle.values()):
        told = ", ".join(f"{n:,} with {what}" for what, n in idle.items() if n)
        yield "slots", f"{layer.slots:,}, of which {fired:,} fired; {told}"
    if layer.pairs:
        pairs = layer.pairs[:3]
        yield "pairs", ", ".join(f"{p['experts'][0]}+{p['experts'][1]}: {p['over_mean']:.1f}x the mean" for p in pairs)
    for label, text in (("mass", "sum of a token's weights"), ("margin", "its first expert over its second")):
        if (seen := layer.confidence[label]) is not None:
            same = seen["max"] - seen["min"] < 1e-6 * seen["max"]  # float32 weights that are renormalised
            spread = "always" if same else f"p10 {seen['p10']:.2f}, p90 {seen['p90']:.2f}"
            yield label, f"{seen['mean']:.2f} ({spread}), {text}"
    if layer.cost:
        c = layer.cost
        yield (
            "cost",
            f"{1e3 * c['observed_seconds']:.3g} ms for {c['tokens']:.0f} tokens on {c['experts_hit_observed']:.0f} "
            f"experts; balanced {1e3 * c['balanced_seconds']:.3g} ms on {c['experts_hit_balanced']:.0f}; "
            f"equal timings differ by {100 * c['noise']:.0f} %",
        )


def _bar(count: int, limit: int) -> str:
    return "." if not count else BARS[min(len(BARS) - 1, count * len(BARS) // (limit + 1))]


def _many(n: int, word: str, plural: str = "s") -> str:
    return f"{n} {word}{'' if n == 1 else plural}"


def _wrapped(text: str, indent: str = "", label: str = "") -> list[str]:
    rest = indent + " " * (len(label) or 2)
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent + label, subsequent_indent=rest, break_on_hyphens=False
    )  # fmt: skip
