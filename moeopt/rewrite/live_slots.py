"""The tensors of each expert for the slots of a row function, read from the user's Parameters at every call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeopt.ir.weight_refs import SlotRefs
from moeopt.rewrite.live_weights import Place


class LiveSlots:
    """A ``moeopt.ops.row_function.SlotBank`` over the Parameters of ``root``, like ``LiveExpertWeights`` for matrices.

    Args:
        root: the block.
        experts: the places of each expert's tensors, in the order of the expert ids.
        check: called with the id of each expert that is read; may raise :class:`~.refused_call.Stale`.
        place: the class that finds and reads a Parameter.
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
        views = []
        for read, index, order, new_dims in self._parts[e]:
            view = read()
            if index is not None:
                view = view[index]
            if order is not None:
                view = view.permute(order)
            for dim in new_dims:
                view = view.unsqueeze(dim)
            views.append(view)
        return views

    def stacked(self) -> None:
        """Slots are read one expert at a time."""
        return None
