"""The bytes of a tensor's elements, to be hashed, compared or written."""

from __future__ import annotations

import torch


def element_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor`` in row-major order, as bytes (uint8, one dimension), on its device.

    A tensor of one element is contiguous whatever its stride is (an expanded number, a row's slice), and PyTorch reads
    as bytes only what has a stride of 1.
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)
