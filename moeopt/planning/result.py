"""What ``plan`` found: plain values that print as a table and turn into JSON with fixed keys."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device that holds most experts; the rest is whole on each, or split in a node.

    Attributes:
        experts, rest, rest_split: weights.
        device: bytes that the device has; a tenth is left for buffers.
        cache_per_token: key-value cache of one token in 16 bits; None where the config does not say.
        cache_tokens: tokens whose cache fits beside ``experts`` and ``rest_split``; None with ``cache_per_token``.
        fits, fits_split: whether the weights fit, with the rest whole and with the rest split.
    """

    experts: float
    rest: float
    rest_split: float
    device: float
    cache_per_token: int | None
    cache_tokens: int | None
    fits: bool
    fits_split: bool


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave a device for one token in one layer, out and back, under uniform routing.

    Attributes:
        out, back: bytes of one number of a row on each way.
        copies_rows, rows: a row for each (token, expert) that is elsewhere.
        copies_ranks, ranks: a row for each (token, device); no dispatch by tokens can send less.
        copies_nodes, nodes: a row for each (token, other node), the part of ``ranks`` that must cross nodes.
        all_reduce: what tensor parallelism sends instead (a ring, 16 bits).
        model: ``ranks`` times the layers with experts.
    """

    out: int
    back: int
    copies_rows: float
    rows: float
    copies_ranks: float
    ranks: float
    copies_nodes: float
    nodes: float
    all_reduce: float
    model: float


@dataclass(frozen=True)
class DecodeStep:
    """A lower bound of the experts' time in one decoding step of ``batch`` tokens over all devices, in seconds."""

    batch: int
    tensor_experts: float
    tensor_sent: float
    expert_experts: float
    expert_sent: float

    @property
    def expert_wins(self) -> bool:
        return self.expert_experts + self.expert_sent < self.tensor_experts + self.tensor_sent


@dataclass(frozen=True)
class LayerPlacement:
    """One layer's experts on the devices, by its measured load.

    Attributes:
        layer: the block's path.
        imbalance: by policy, load of the busiest device over the mean.
        chosen: the policy with the least; the simplest of those within 1 %.
        ranks: for each expert the devices that hold it, under ``chosen``.
    """

    layer: str
    imbalance: dict[str, float]
    chosen: str
    ranks: list[list[int]]


@dataclass(frozen=True)
class ClusterPlan:
    """A model's experts on ``devices`` devices in nodes of ``node``. Bytes, seconds and counts; nothing was run."""

    name: str
    devices: int
    node: int
    device: str
    dtype: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    moe_layers: int
    expert_params: int
    rest_params: int
    memory: RankMemory
    traffic: Traffic
    decode: list[DecodeStep]
    placements: list[LayerPlacement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def expert_parallel_from(self) -> int | None:
        """The least planned batch from which on expert parallelism is the faster; None if at none."""
        best = None
        for step in reversed(self.decode):
            if not step.expert_wins:
                break
            best = step.batch
        return best

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with fixed keys: the fields, ``schema`` and ``expert_parallel_from``."""
        return {"schema": SCHEMA, **asdict(self), "expert_parallel_from": self.expert_parallel_from}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        from moeopt.planning.render import lines

        return "\n".join(lines(self))
