"""Which way and which tiles: a small table, by the rows that an expert gets and the dtype of the products."""

from __future__ import annotations

from typing import NamedTuple

FEW_PAIRS = 32
PAIRS_PER_EXPERT = 2


def few_pairs(E: int) -> int:
    """Pairs (token, expert) up to which each pair reads its own expert's weights and nothing is sorted.

    More pairs an expert would read its weights so often from the L2 cache that this takes longer than memory does.
    """
    return min(FEW_PAIRS, PAIRS_PER_EXPERT * E)


TOGETHER = 16
"""Tiles of rows that take all columns before the next tiles do: what runs at once shares rows and weights in L2."""


class Tiles(NamedTuple):
    """Rows, columns and depth of a tile of a product, and how Triton shall run it.

    The second product's tile is ``wider`` times as wide: it holds one sum, and the first product gate's and up's.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    wider: int = 1

    @property
    def columns_out(self) -> int:
        return self.wider * self.columns


def tiles_for(rows_per_expert: float, itemsize: int, held: int, capability: int) -> Tiles:
    """The tile for a product of that many rows an expert.

    Args:
        rows_per_expert: mean number of rows, R / E.
        itemsize: bytes of the compute dtype: 2, or 4 (no tensor core in full float32: registers bound the tile).
        held: bytes of the weights' dtype, which is what waits in shared memory.
        capability: compute capability as 80, 90, 100, ...
    """
    if itemsize == 4:
        return Tiles(16, 64, 32, 4, 2) if rows_per_expert <= 16 else Tiles(64, 64, 16, 8, 2)
    depth = 64 * itemsize // max(held, itemsize)
    if rows_per_expert <= 16:
        return Tiles(16, 64, depth, 4, 4)
    # a wgmma of sm_90 has 64 rows at least; the wide tile with two accumulators spills on sm_80 to 89
    if rows_per_expert <= 64 or capability < 90 or capability >= 120:
        return Tiles(64, 64, depth, 4, 3, 2)
    # wide as soon as 64 rows do not hold an expert's: each tile reads the expert's weights again from L2
    return Tiles(128, 128, depth, 8, 3, 2)
