"""Quantiles of a stream of numbers in fixed memory: counts in bins, with the exact mean, least and largest beside them.

A quantile is interpolated inside its bin, so it is off by less than a bin's width, and never outside of what was seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = torch.linspace(0, 1, 201, dtype=torch.float64)
"""Bins for what lies between 0 and 1: 0.005 wide."""
AMOUNTS = torch.logspace(-16, 8, 24 * 32 + 1, base=2, dtype=torch.float64)
"""Bins for positive amounts: 2.2 % wide, from 1.5e-5 to 256; what lies outside falls into the first or last."""
LEVELS = (0.1, 0.5, 0.9)


class Histogram:
    """Add tensors, then ask; ``edges`` are the B + 1 borders of the bins, ascending."""

    def __init__(self, edges: Tensor) -> None:
        self.edges = edges
        self.bins = torch.zeros(edges.numel() - 1, dtype=torch.int64)
        self.count, self.total = 0, 0.0
        self.least, self.largest = float("inf"), float("-inf")

    def add(self, values: Tensor) -> None:
        """Finite values of any shape and float dtype."""
        flat = values.detach().reshape(-1).to("cpu", torch.float64).contiguous()
        if not flat.numel():
            return
        at = (torch.bucketize(flat, self.edges, right=True) - 1).clamp_(0, self.bins.numel() - 1)
        self.bins += torch.bincount(at, minlength=self.bins.numel())
        self.count += flat.numel()
        self.total += float(flat.sum())
        self.least = min(self.least, float(flat.min()))
        self.largest = max(self.largest, float(flat.max()))

    def quantile(self, level: float) -> float:
        """The value below which ``level`` of the stream lies; NaN of an empty one."""
        if not self.count:
            return float("nan")
        upto = self.bins.cumsum(0)
        at = int(torch.searchsorted(upto, torch.tensor(level * self.count).to(upto.dtype).clamp_min(1)))
        before = int(upto[at - 1]) if at else 0
        inside = min(max((level * self.count - before) / int(self.bins[at]), 0.0), 1.0)
        value = float(self.edges[at] + inside * (self.edges[at + 1] - self.edges[at]))
        return min(max(value, self.least), self.largest)

    def summary(self) -> dict[str, float] | None:
        """mean, min, p10, p50, p90, max; None of an empty stream."""
        if not self.count:
            return None
        quantiles = {f"p{round(100 * level)}": self.quantile(level) for level in LEVELS}
        return {"mean": self.total / self.count, "min": self.least, **quantiles, "max": self.largest}
