"""What ``inspect`` found: one value that prints as a table and turns into JSON with fixed keys."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from moeopt.inspection.counting import CONVENTIONS, Counts
from moeopt.inspection.devices import Device
from moeopt.inspection.memory import Fit
from moeopt.inspection.quantized import QuantizedSizes
from moeopt.inspection.roofline import ForwardPass
from moeopt.published.headers import Stored


@dataclass(frozen=True)
class BlockKind:
    """MoE blocks that are alike.

    Attributes:
        blocks: how many there are.
        experts, top_k: E and K; K is None where it is not fixed or was not seen.
        shared: networks that every token of the layer passes, in widths of an expert where that is a whole number.
        hidden, inner, gated: the sizes and the form of one expert.
        router: how it chooses, in words.
    """

    blocks: int
    experts: int
    top_k: int | None
    shared: int
    hidden: int
    inner: int
    gated: bool
    router: str


@dataclass(frozen=True)
class Inspection:
    """Structure, parameters, memory and work of a model. ``kinds`` is empty for a dense model."""

    name: str
    source: str
    layers: int
    moe_layers: int
    kinds: list[BlockKind]
    counts: Counts
    device: Device
    memory: list[Fit]
    bits: int
    batch: int
    prefill: ForwardPass
    decode: ForwardPass
    stored: Stored | None = None
    notes: list[str] = field(default_factory=list)
    quantized: QuantizedSizes | None = None

    @property
    def main(self) -> BlockKind | None:
        """The kind of most blocks."""
        return max(self.kinds, key=lambda k: k.blocks, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values. Fixed keys: layers, experts, top_k, shared_experts, router, params.total,
        params.active.{all, no_input_embedding, no_embeddings}, memory, per_token.

        A dense model has 0 experts and the router None; ``top_k`` is None where K is not known.
        """
        main = self.main
        device = {"name": self.device.name, "memory_bytes": self.device.memory, "bandwidth": self.device.bandwidth,
                  "flops": self.device.flops, "source": self.device.source}  # fmt: skip
        return {
            "model": self.name,
            "source": self.source,
            "layers": self.layers,
            "moe_layers": self.moe_layers,
            "experts": main.experts if main else 0,
            "top_k": main.top_k if main else 0,
            "shared_experts": main.shared if main else 0,
            "router": main.router if main else None,
            "kinds": [asdict(k) for k in self.kinds],
            "params": {
                "total": self.counts.all,
                "active": self.counts.by_convention(),
                "by_part": {"total": self.counts.total, "active": self.counts.active},
                "conventions": CONVENTIONS,
            },
            "memory": {"device": device, "bits": {str(f.bits): f.to_dict() for f in self.memory}},
            "per_token": {
                "bits": self.bits,
                "batch": self.batch,
                "prefill": self.prefill.to_dict(),
                "decode": self.decode.to_dict(),
            },
            "stored": asdict(self.stored) if self.stored else None,
            "quantized": self.quantized.to_dict() if self.quantized else None,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        from moeopt.inspection.render import table

        return table(self)

    def _repr_html_(self) -> str:
        from moeopt.html import inspection_table

        return inspection_table(self.to_dict())
