"""Rows as a product of codes reads them that takes both factors in 8 bits: faster, and a loss beside the weights' own.

    step = largest of |x| in a block / 127          q = round(x / step), ties to even          read is q * step

The rounding moves a number by half a step at most: a product of a row with ``w`` by at most the sum over blocks of
``largest / 254`` times the sum of ``|w|`` in the block. A block without a number of 2^-119 or more is read as zeros,
for its step would be no normal float32; one with a NaN or an infinity is NaN altogether, and so are its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_BLOCK = 32
"""How many numbers of a row share a step in moeopt's own kernel."""
STEPS = 127
LEAST = 2.0**-119
"""Of the largest number of a block that is no block of zeros."""


def rounded_rows(x_TK: Tensor, block: int = ROW_BLOCK, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x`` (T, K), any float dtype, as such a product reads it: a new (T, K) tensor of ``dtype``.

    Args:
        block: how many numbers share a step; the last block of a row may be shorter.
        dtype: float32 as the kernel has it, or float64.
    """
    T, K = x_TK.shape
    wide = torch.nn.functional.pad(x_TK.to(dtype), (0, -K % block)).view(T, -1, block)
    largest = wide.abs().amax(-1, keepdim=True)
    step = largest / STEPS
    found = torch.where(largest >= LEAST, (wide / step).round() * step, 0.0)
    found = torch.where(largest.isfinite(), found, torch.nan)
    return found.view(T, -1)[:, :K].contiguous()
