"""What each expert has in the slots of a row function, read from the user's own Parameters at every call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeopt.ir.weight_refs import SlotRefs
from moeopt.rewrite.live_weights import Place


class LiveSlots:
    """``moeopt.ops.row_function.SlotBank`` over the Parameters of ``root``; like ``live_weights.LiveExpertWeights``.

    Args:
        root: the block.
        experts: where each expert's slots are, in the order of their ids.
        check: called with the number of each expert that is read; may raise :class:`~.live_weights.Stale`.
        place: what finds and reads each Parameter.
    """

    def __init__(
        self,
        root: nn.Module,
        experts: list[SlotRefs],
        check: Callable[[int], None] = lambda e: None,
        place: type[Place] = Place,
    ) -> None:
        self.num_experts, self._check = len(experts), check
        places: dict[str, Place] = {}
        for part in dict.fromkeys(p for ref in experts for p in ref.slots):
            if part.path not in places:
                places[part.path] = place(root, part.path)
        self._parts = [
            [(p.read, *part.steps_from(tuple(p.part_shape))) for part in ref.slots for p in [places[part.path]]]
            for ref in experts
        ]

    def slots(self, e: int) -> list[Tensor]:
        """Views of expert ``e``'s Parameters, as they are now."""
        if not torch.compiler.is_compiling():
            self._check(e)
        found = []
        for read, at, order, new in self._parts[e]:
            part = read()
            if at is not None:
                part = part[at]
            if order is not None:
                part = part.permute(order)
            for dim in new:
                part = part.unsqueeze(dim)
            found.append(part)
        return found

    def stacked(self) -> None:
        """Slots are read one expert at a time."""
        return None
