"""Microseconds below which each path of the experts can't be on a GPU, from counts: a model, and no measurement.

A kernel takes no less than the longest of: its bytes from memory, its bytes from the L2 cache, its products, the loads
that wait for one another, and what its programs keep in flight at once. Grids and tiles are those that the kernels are
launched with: the launching code runs, with stand-ins that write down what they are given.

Shape legend: T tokens, E experts, K chosen per token, R = T*K pairs, H hidden, I intermediate.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights
from moeopt.ops.triton import launch
from moeopt.ops.triton.tiles import tiles_for


class Gpu(NamedTuple):
    """Peaks of a GPU, as its maker publishes them, and three assumptions that are nobody's figures.

    ``l2_rate`` is the 5120 bytes a clock that NVIDIA states for the A100, at this GPU's boost clock. ``latency`` is
    that of a load from memory, ``gap`` from one kernel's end to the next one's begin in a CUDA graph, ``op`` what the
    host takes for one call of PyTorch outside of a graph, and ``wait`` for one wait, all in seconds.
    """

    name: str
    capability: int
    sms: int
    memory_rate: float
    matrix_flops: float
    vector_flops: float
    l2: float
    l2_rate: float
    shared: int
    latency: float = 0.5e-6
    gap: float = 1e-6
    op: float = 4e-6
    wait: float = 8e-6


GPUS = {
    "h100": Gpu("H100 SXM", 90, 132, 3.35e12, 989e12, 67e12, 50e6, 5120 * 1.755e9, 227 << 10),
    "a100": Gpu("A100 SXM 80 GB", 80, 108, 2.039e12, 312e12, 19.5e12, 40e6, 5120 * 1.41e9, 163 << 10),
}
BLOCKS = {
    "mixtral-small": (8, 2, 1024, 3584),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "sixteen": (16, 4, 1024, 3584),
}
"""E, K, H, I."""
TOKENS = (1, 4, 16, 64, 512, 4096)
SIZE = 2
"""Bytes of bfloat16."""


class Launch(NamedTuple):
    """One launch, as the kernel was given it: its name, grid and constants."""

    name: str
    grid: tuple[int, ...]
    constants: dict[str, Any]


class Cell(NamedTuple):
    """A block on T tokens: how many rows each expert gets, by a random routing that is the same in each run."""

    E: int
    K: int
    H: int
    I: int  # noqa: E741
    T: int
    ids: Tensor
    rows: list[int]

    @property
    def R(self) -> int:
        return self.T * self.K

    @property
    def hit(self) -> int:
        return sum(n > 0 for n in self.rows)

    def matrix(self, count: int = 1) -> int:
        """Bytes of ``count`` matrices of one expert."""
        return count * self.H * self.I * SIZE


def cell(block: str, T: int) -> Cell:
    E, K, H, I = BLOCKS[block]
    ids = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).topk(K).indices
    return Cell(E, K, H, I, T, ids, ids.flatten().bincount(minlength=E).tolist())


def floor(c: Cell, gpu: Gpu) -> float:
    """Seconds below which nothing can be: the weights that are hit are read, and the products are made."""
    return max(c.hit * c.matrix(3) / gpu.memory_rate, 2 * c.R * 3 * c.H * c.I / gpu.matrix_flops)


def launched(c: Cell, gpu: Gpu, spec: ExpertsSpec | None = None) -> list[Launch]:
    """What one call of the kernels launches. All experts are one tensor here: the grid does not look at it."""
    w_in, w_out = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((c.I, c.H), (c.H, c.I)))
    bank = ListExpertWeights([[w_in] * c.E, [w_in] * c.E], [w_out] * c.E)
    x, weights = (torch.empty(c.T, n, dtype=torch.bfloat16) for n in (c.H, c.K))
    tiles = tiles_for(c.R / c.E, SIZE, SIZE, gpu.capability)
    with _written_down() as log:
        launch.experts_triton(x, c.ids, weights, bank, spec or ExpertsSpec(rows="separate"), tiles=tiles)
    return log


@contextlib.contextmanager
def _written_down() -> Iterator[list[Launch]]:
    """Every kernel is a stand-in that notes how it is launched."""
    from moeopt.ops.triton import kernels

    log: list[Launch] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **constants: log.append(Launch(self.name, grid, constants))

    before = {name: vars(kernels)[name] for name in SECONDS}
    try:
        for name in before:
            setattr(kernels, name, Noted(name))
        yield log
    finally:
        for name, kernel in before.items():
            setattr(kernels, name, kernel)


def seconds(one: Launch, c: Cell, gpu: Gpu) -> float:
    """The longest of a kernel's bounds."""
    return max(SECONDS[one.name](one, c, gpu).values())


def _vector_product(one: Launch, c: Cell, gpu: Gpu, matrices: int, depth: int,
                    experts: int = 1) -> dict[str, float]:  # fmt: skip
    """Products of single rows: each pair reads the weights of its expert, from L2 but for the first to read them."""
    BN, BK, programs = one.constants["BN"], one.constants["BK"], math.prod(one.grid)
    cached = c.R * c.matrix(matrices) + programs * depth * SIZE
    flight = min(programs, 8 * gpu.sms) * experts * matrices * BN * min(BK, depth) * SIZE
    chain = 2 + -(-depth // BK)  # the id, the address, and one tile after the other
    return {
        "memory": c.hit * c.matrix(matrices) / gpu.memory_rate,
        "L2": cached / gpu.l2_rate,
        "products": 2 * c.R * matrices * c.H * c.I / gpu.vector_flops,
        "latency": max(chain, c.R * c.matrix(matrices) / flight) * gpu.latency,
    }


def _gemv_in(one: Launch, c: Cell, gpu: Gpu) -> dict[str, float]:
    return _vector_product(one, c, gpu, 2, c.H)


def _gemv_out(one: Launch, c: Cell, gpu: Gpu) -> dict[str, float]:
    return _vector_product(one, c, gpu, 1, c.I, c.K)


def _gemv_pair(one: Launch, c: Cell, gpu: Gpu) -> dict[str, float]:
    return _vector_product(one, c, gpu, 1, c.I)


def _sort_pairs(one: Launch, c: Cell, gpu: Gpu) -> dict[str, float]:
    """Every program reads all ids twice, a block after the other."""
    ids = 2 * c.R * c.ids.itemsize
    blocks = 2 * -(-c.R // one.constants["BLOCK"])
    return {"memory": ids / gpu.memory_rate, "L2": c.E * ids / gpu.l2_rate, "latency": blocks * gpu.latency}


def _combine(one: Launch, c: Cell, gpu: Gpu) -> dict[str, float]:
    moved = (_out_of_cache(c.R * c.H * SIZE, gpu) + c.T * c.H * SIZE) / gpu.memory_rate
    return {"memory": moved, "L2": c.R * c.H * SIZE / gpu.l2_rate, "latency": 2 * c.K * gpu.latency}


def _combine_normed(one: Launch, c: Cell, gpu: Gpu) -> dict[str, float]:
    return _combine(one, c, gpu)


def _tile_in(one: Launch, c: Cell, gpu: Gpu) -> dict[str, float]:
    return _tiles(one, c, gpu, 2, c.H, c.I, c.T * c.H * SIZE, c.R * c.I * SIZE)


def _tile_out(one: Launch, c: Cell, gpu: Gpu) -> dict[str, float]:
    return _tiles(one, c, gpu, 1, c.I, c.H, c.R * c.I * SIZE, c.R * c.H * SIZE)


def _out_of_cache(size: int, gpu: Gpu) -> int:
    """Bytes that are written and read again: none where half of the L2 holds them."""
    return size if size > gpu.l2 / 2 else 0


def _tiles(one: Launch, c: Cell, gpu: Gpu, matrices: int, depth: int, width: int, read: int,
           written: int) -> dict[str, float]:  # fmt: skip
    """Tiled products: programs run in the order of their numbers, and those that run at once share what they read."""
    memory, cached, programs = read_by_tiles(one, c, gpu, matrices, depth, width, read <= gpu.l2 / 2)
    BM, BN = one.constants["BM"], one.constants["BN"]
    turns = -(-programs // gpu.sms) * gpu.sms / programs  # an SM has a program more than another
    return {
        "memory": (memory + _out_of_cache(written, gpu)) / gpu.memory_rate,
        "L2": turns * cached / gpu.l2_rate,
        "products": turns * 2 * programs * BM * BN * matrices * depth / gpu.matrix_flops,
        "latency": (3 + -(-depth // one.constants["BK"]) / one.constants["num_stages"]) * gpu.latency,
    }


def read_by_tiles(one: Launch, c: Cell, gpu: Gpu, matrices: int, depth: int, width: int,
                  rows_cached: bool) -> tuple[int, int, int]:  # fmt: skip
    """Bytes read from memory and from L2, and programs that multiply, with an L2 that forgets what was used least."""
    from moeopt.ops.triton.prefill_kernels import place_of_program

    BM, BN, BK = (one.constants[name] for name in ("BM", "BN", "BK"))
    tiles = [(e, min(BM, n - first)) for e, n in enumerate(c.rows) for first in range(0, n, BM)]
    columns = -(-width // BN)
    most = one.grid[0] // columns
    places = [place_of_program.fn(p, most, columns, one.constants["TOGETHER"]) for p in range(one.grid[0])]
    places = [(tile, block) for tile, block in places if tile < len(tiles)]
    shared = (BM * BK + matrices * BK * BN) * SIZE * one.constants["num_stages"]
    at_once = gpu.sms * max(1, gpu.shared // shared)
    held: OrderedDict[tuple[Any, ...], int] = OrderedDict()
    memory, cached = read_once(rows_cached, tiles, depth), 0
    for start in range(0, len(places), at_once):
        wanted: dict[tuple[Any, ...], int] = {}
        for tile, block in places[start : start + at_once]:
            expert, rows = tiles[tile]
            weights = min(BN, width - block * BN) * depth * matrices * SIZE
            wanted[expert, block] = weights
            if not rows_cached:
                wanted[("rows", tile)] = rows * depth * SIZE
            cached += rows * depth * SIZE + weights
        for what, size in wanted.items():
            if what in held:
                held.move_to_end(what)
                continue
            memory, held[what] = memory + size, size
        while sum(held.values()) > gpu.l2:
            held.popitem(last=False)
    return memory, cached, len(places)


def read_once(cached: bool, tiles: list[tuple[int, int]], depth: int) -> int:
    """Bytes of rows that lie in the L2 all the time; others are counted where they are read."""
    return sum(rows for _, rows in tiles) * depth * SIZE if cached else 0


SECONDS = {
    "gemv_in": _gemv_in, "gemv_out": _gemv_out, "gemv_pair": _gemv_pair, "sort_pairs": _sort_pairs,
    "tile_in": _tile_in, "tile_out": _tile_out, "combine": _combine, "combine_normed": _combine_normed,
}  # fmt: skip
"""The bounds of each kernel."""
