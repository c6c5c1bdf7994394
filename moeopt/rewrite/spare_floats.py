"""Memory for the floats of one block after the other: fresh memory costs more than what is written to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SpareFloats:
    """Tensors that nobody uses now, by how they lie."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], list[Tensor]] = {}

    def take(self, like: Tensor, device: torch.device) -> Tensor:
        """A tensor of any values that lies as ``like`` does, on ``device``; nobody else has it."""
        held = self._held.get(_key(like, device))
        return held.pop() if held else torch.empty_like(like, device=device)

    def give(self, floats: Tensor) -> None:
        """Take ``floats`` back."""
        if type(floats) in (Tensor, nn.Parameter):
            self._held.setdefault(_key(floats, floats.device), []).append(floats)


def _key(like: Tensor, device: torch.device) -> tuple[Any, ...]:
    return type(like), tuple(like.shape), like.stride(), like.dtype, device
