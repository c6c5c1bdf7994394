"""What ``profile`` found: counts and measures for each layer; prints as a table, turns into JSON with fixed keys."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeopt.profiling.statistics import HOT, imbalance, top_pairs
from moeopt.profiling.tally import Tally

SCHEMA = 1
MATRIX_UP_TO = 64
"""Experts up to which the JSON holds the whole co-activation matrix; above, what is right of its diagonal, as text."""


@dataclass(frozen=True)
class LayerLoad:
    """One MoE block's load. T tokens, E experts, K slots.

    Attributes:
        name: the module's path; with [i] where a module holds several groups of experts.
        fired: for each of the E experts, how many slots fired it: named it with a weight that is not zero.
        calls, tokens, slots: how often the block ran, on how many tokens in all, and T K summed.
        negative, beyond, zero_weight: slots that fired nothing: id < 0, id >= E, or a weight of zero.
        without: tokens that reached no expert.
        top_k: the most slots a token had.
        unseen, why_unseen: calls that ran the block's original code and could not be counted, and why.
        imbalance: see ``moeopt.profiling.statistics``; None where nothing fired.
        pairs: the most frequent pairs of experts of one token.
        together: (E, E) tokens that fired both; [a, a] those that fired a.
        confidence: mass, share and margin of the routing weights: mean, min, p10, p50, p90, max.
        cost: the op's time as routed and balanced; None where it was not measured.
    """

    name: str
    fired: list[int]
    calls: int
    tokens: int
    slots: int
    negative: int
    beyond: int
    zero_weight: int
    without: int
    top_k: int
    unseen: int
    why_unseen: str
    imbalance: dict[str, Any] | None
    pairs: list[dict[str, Any]]
    together: list[list[int]]
    confidence: dict[str, dict[str, float] | None]
    cost: dict[str, float] | None

    @property
    def experts(self) -> int:
        return len(self.fired)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields and ``experts``.

        Above 64 experts ``together`` is None, and ``together_above_diagonal`` has for each expert but the last a line
        of the counts with the experts after it, separated by spaces; up to 64 that key is None.
        """
        fields = self._drawn()
        if self.experts > MATRIX_UP_TO:
            rows = enumerate(self.together[:-1], start=1)
            fields["together_above_diagonal"] = [" ".join(map(str, row[after:])) for after, row in rows]
        return fields

    def _drawn(self) -> dict[str, Any]:
        """What a page draws: :meth:`to_dict` but the pairs of many experts, which would be most of its bytes."""
        # asdict copies number by number: 262,144 of them for 512 experts, which few callers want
        fields = {"experts": self.experts, **asdict(replace(self, together=[])), "together_above_diagonal": None}
        fields["together"] = None if self.experts > MATRIX_UP_TO else [list(row) for row in self.together]
        return fields


@dataclass(frozen=True)
class Unread:
    """An MoE block whose routing could not be read: it was declined for ``reason``."""

    name: str
    reason: str
    source: str = ""


def layer_load(tally: Tally) -> LayerLoad:
    """The sums of one block's counts."""
    return LayerLoad(
        name=tally.name,
        fired=tally.fired.tolist(),
        calls=tally.calls,
        tokens=tally.tokens,
        slots=tally.slots,
        negative=tally.negative,
        beyond=tally.beyond,
        zero_weight=tally.zero_weight,
        without=tally.without,
        top_k=tally.widest,
        unseen=tally.unseen,
        why_unseen=tally.why_unseen,
        imbalance=imbalance(tally.fired, tally.tokens),
        pairs=top_pairs(tally.together),
        together=tally.together.tolist(),
        confidence={
            "mass": tally.mass.summary(),
            "share": tally.share.summary(),
            "margin": tally.margin.summary(),
        },
        cost=tally.cost.summary(),
    )


@dataclass(frozen=True)
class LoadProfile:
    """The load of every MoE block of one model on some data.

    Attributes:
        layers: one entry per rewritten block, in the order of the model's modules.
        unread: MoE blocks that were declined, with the reason.
        batches: calls of the model.
        seconds: time it took, the rewriting included.
    """

    model: str
    batches: int
    layers: tuple[LayerLoad, ...]
    unread: tuple[Unread, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with fixed keys; ``layers`` are :meth:`LayerLoad.to_dict`."""
        return self._with(LayerLoad.to_dict)

    def _with(self, form: Callable[[LayerLoad], dict[str, Any]]) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "batches": self.batches,
            "seconds": self.seconds,
            "thresholds": {"dead": 0, "hot": HOT},
            "layers": [form(layer) for layer in self.layers],
            "unread": [asdict(u) for u in self.unread],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained HTML file: the table, the heat map, what each layer's load is.

        Raises:
            UsageError: jinja2 is not installed; the folder does not exist.
        """
        from moeopt.html import write_page

        return write_page(path, profile=self._with(LayerLoad._drawn))

    def __str__(self) -> str:
        from moeopt.profiling.render import lines

        return "\n".join(lines(self))

    def _repr_html_(self) -> str:
        from moeopt.html import load_table

        return load_table(self._with(LayerLoad._drawn))
