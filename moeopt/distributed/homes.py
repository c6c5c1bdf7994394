"""Which rank runs which expert: a placement as tables that ids are looked up in.

Shape legend: T tokens, K chosen per token, E experts, P ranks, C copies of the expert that has most.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeopt.planning.placement import Placement


@dataclass
class ExpertHomes:
    """The ranks of each expert of one op; ``ranks[e]`` lists those that hold expert e, the first one first."""

    ranks: Placement
    size: int
    _tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def experts_of(self, rank: int) -> list[int]:
        """The experts that ``rank`` holds, ascending: expert number i there is the i-th of them."""
        return [e for e, ranks in enumerate(self.ranks) if rank in ranks]

    @functools.cached_property
    def copied(self) -> bool:
        """Whether an expert lies on several ranks."""
        return any(len(ranks) > 1 for ranks in self.ranks)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """copies_E, how many there are; rank_EC, where; number_EP, which expert it is there, -1 where it is not."""
        if device not in self._tables:
            E, most = len(self.ranks), max(len(ranks) for ranks in self.ranks)
            rank_EC, number_EP = torch.zeros(E, most, dtype=torch.int64), torch.full((E, self.size), -1)
            for e, ranks in enumerate(self.ranks):
                rank_EC[e, : len(ranks)] = torch.tensor(ranks)
            for rank in range(self.size):
                own = self.experts_of(rank)
                number_EP[own, rank] = torch.arange(len(own))
            copies_E = torch.tensor([len(ranks) for ranks in self.ranks])
            self._tables[device] = copies_E.to(device), rank_EC.to(device), number_EP.to(device)
        return self._tables[device]

    def ranks_for(self, ids_TK: Tensor, own: int | None) -> Tensor:
        """The rank (T, K) that each chosen expert runs on; P where the id names none.

        Tokens take the copies of an expert in turn. ``own``: the rank that asks, which runs what it holds itself;
        None where all ranks have the same tokens and must decide alike.
        """
        copies_E, rank_EC, number_EP = self.tables(ids_TK.device)
        known_TK = (ids_TK >= 0) & (ids_TK < len(self.ranks))
        ids_TK = torch.where(known_TK, ids_TK, 0).long()
        turn_T1 = torch.arange(ids_TK.shape[0], device=ids_TK.device).unsqueeze(1) + (own or 0)
        rank_TK = rank_EC[ids_TK, turn_T1 % copies_E[ids_TK]]
        if own is not None and self.copied:
            rank_TK = torch.where(number_EP[ids_TK, own] >= 0, own, rank_TK)
        return torch.where(known_TK, rank_TK, self.size)

    def numbers_at(self, ids_TK: Tensor, rank_TK: Tensor) -> Tensor:
        """Which expert of that rank each id is; -1, which adds nothing, where the rank is P."""
        _, _, number_EP = self.tables(ids_TK.device)
        inside_TK = rank_TK < self.size
        zero = torch.zeros_like(rank_TK)
        found_TK = number_EP[torch.where(inside_TK, ids_TK, zero).long(), torch.where(inside_TK, rank_TK, zero)]
        return torch.where(inside_TK, found_TK, -1)
