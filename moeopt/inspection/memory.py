"""What the weights need at each width, and what of it a device can hold.

Every expert must be resident, chosen or not. Weights only: no KV cache, no activations, and at 8 and 4 bits none of the
scales that a real format adds (about 3 to 12 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moeopt.inspection.devices import Device

BITS = (32, 16, 8, 4)


@dataclass(frozen=True)
class Fit:
    """Weights at one width on one device; ``short_by`` is what is missing, negative for what stays free (bytes)."""

    bits: int
    bytes: int
    short_by: float
    devices: int

    @property
    def fits(self) -> bool:
        return self.short_by <= 0

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "fits": self.fits, "short_by_bytes": max(round(self.short_by), 0),
                "free_bytes": max(-round(self.short_by), 0), "devices": self.devices}  # fmt: skip


def fits(parameters: int, device: Device) -> list[Fit]:
    """One row for each width. ``devices`` is how many would hold the weights if they were split evenly."""
    return [fit(bits, math.ceil(parameters * bits / 8), device) for bits in BITS]


def fit(bits: int, size: int, device: Device) -> Fit:
    """``size`` bytes on ``device``."""
    return Fit(bits, size, size - device.memory, max(math.ceil(size / device.memory), 1))
