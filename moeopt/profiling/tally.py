"""The counts of one block, from the ids and weights that each call of its op is given.

Shape legend: T tokens, E experts, K slots per token. A slot *fires* an expert when its id is one of the E and its
weight is not zero. Every other slot is counted by what it is instead, so that

    slots == sum(fired) + negative + beyond + zero_weight

Nothing but counts is kept: E integers, E x E for pairs, two or three histograms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.profiling.cost import RoutingCost
from moeopt.profiling.histogram import AMOUNTS, SHARES, Histogram

CHUNK = 1024
"""Tokens whose pairs are counted at once: a (CHUNK, E) table of zeros and ones, exact in float32 up to 2^24 tokens."""


class Tally:
    """See the module's docstring.

    Args:
        module: its path; with ``group``, where a module holds several groups of experts.

    Attributes:
        fired: (E,) int64, how many slots fired each expert.
        together: (E, E) int64; [a, b] is the number of tokens that fired both, [a, a] of those that fired a.
        mass: sum of a token's weights; share: its largest weight's part of that; margin: what the largest has
            over the second, as a part of that. Tokens without an expert, or with a weight that is negative or not
            finite, are in none of the three; share and margin hold tokens with two experts or more only.
        widest: the most slots a token had.
        unseen: calls that ran the block's original code, and so were not counted; ``why_unseen`` says why.
    """

    def __init__(self, module: str, experts: int, group: int | None = None) -> None:
        self.module, self.experts = module, experts
        self.name = module if group is None else f"{module}[{group}]"
        self.calls = self.tokens = self.slots = self.negative = self.beyond = self.zero_weight = self.without = 0
        self.widest = 0
        self.fired = torch.zeros(experts, dtype=torch.int64)
        self.together = torch.zeros(experts, experts, dtype=torch.int64)
        self.mass, self.share, self.margin = Histogram(AMOUNTS), Histogram(SHARES), Histogram(SHARES)
        self.cost = RoutingCost()
        self.unseen, self.why_unseen = 0, ""

    def add(self, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Count one call: ids (T, K) integers, weights (T, K) floats."""
        ids, weights = ids_TK.detach(), weights_TK.detach()
        self.calls += 1
        self.tokens += ids.shape[0]
        self.slots += ids.numel()
        self.widest = max(self.widest, ids.shape[1])
        if not ids.numel():
            self.without += ids.shape[0]
            return
        inside = (ids >= 0) & (ids < self.experts)
        fires = inside & (weights != 0)
        self.negative += int((ids < 0).sum())
        self.beyond += int((ids >= self.experts).sum())
        self.zero_weight += int((inside & (weights == 0)).sum())
        self.without += int((~fires.any(dim=1)).sum())
        self.fired += torch.bincount(ids[fires], minlength=self.experts).cpu()
        self._pairs(ids, fires)
        self._confidence(torch.where(fires, weights, 0).double())

    def _pairs(self, ids: Tensor, fires: Tensor) -> None:
        for ids_MK, fires_MK in zip(ids.split(CHUNK), fires.split(CHUNK), strict=True):
            # one column more takes the slots that fire nothing
            table = torch.zeros(ids_MK.shape[0], self.experts + 1, device=ids.device)
            table.scatter_(1, torch.where(fires_MK, ids_MK, self.experts).long(), 1.0)
            member = table[:, : self.experts]
            self.together += (member.t() @ member).round().to("cpu", torch.int64)

    def _confidence(self, weights: Tensor) -> None:
        mass = weights.sum(dim=1)
        good = weights.isfinite().all(dim=1) & (mass > 0) & (weights >= 0).all(dim=1)
        weights, mass = weights[good], mass[good]
        self.mass.add(mass)
        if weights.shape[1] < 2:
            return
        top = weights.topk(2, dim=1).values / mass[:, None]
        top = top[top[:, 1] > 0]
        self.share.add(top[:, 0])
        self.margin.add(top[:, 0] - top[:, 1])
