"""Rows that take a router where no ordinary row takes it.

A block's products of rows with a narrow matrix are its router's logits, or the logits of a gate. From the matrix
follows the direction in which all of them grow alike, so a row can be made whose logits all lie near a level that
is asked for; behind a norm, rows along that direction come as near as the norm lets them.

    ordinary        gaussian, at the scale of the given rows; every other kind is made from these
    up, down        of a router that is no product: along a linear fit of its scores, at several lengths
    level L         all logits of one product lie near L: the tails of sigmoid, softplus, exp, log
    equal           all logits alike but for rounding, and nearly alike
    zeros, copies   padding; equal tokens
    tiny, huge      epsilons, underflow, saturation; rows a given power of ten smaller or larger
    NaN             one broken token beside sound ones

Shape legend: R rows, H hidden, n columns of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.value_types import FxTarget, PyObject

LEVELS = (-70, -40, -30, -24, -20, -18, -16, -14, -12, -10, -8, -6, -4, 4, 8, 12, 16, 18, 24, 40, 70)
"""Logits. Below -87 the exponential of a float32 has no digits left, and nothing can be told."""
POWERS = (-30, -20, -12, -8, -6, -5, -4, -3, -2, 1, 2, 3, 4, 6)
"""Of ten, by which tiny and huge rows differ from ordinary ones."""
PRODUCTS = 4
"""At most so many products are steered."""
ORDINARY = 32


@dataclass
class SteeredRows:
    """Rows for a block: ``values`` (R, H), and for each what kind it is of."""

    name: str
    values: Tensor
    kinds: list[str]


@dataclass
class _Product:
    """``rows`` (R, H') that were multiplied by ``matrix`` (H', n)."""

    rows: Tensor
    matrix: Tensor


class _Products(TorchDispatchMode):
    """Keeps the products of R rows with a matrix of few columns."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.rows, self.columns = rows, columns
        self.found: list[_Product] = []

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            a, b = args[-2:]
            if name == "aten::bmm" and len(a) == 1:
                a, b = a[0], b[0]
            if a.dim() == 2 and a.shape[0] == self.rows and b.shape[1] <= self.columns:
                self.found.append(_Product(a.detach().double(), b.detach().double()))
        return out


def steered_rows(
    ordinary: Tensor, run: Callable[[Tensor], Iterable[Tensor]], experts: int, generator: torch.Generator
) -> list[SteeredRows]:
    """The rows of the module's table, as one call each.

    Args:
        ordinary: (R, H), at least ``ORDINARY`` rows of the block's own scale.
        run: the block on R rows, in PyTorch, its experts as one op; what its choices compared, (..., E) each.
        experts: how many columns a router's matrix has.
    """
    base = ordinary[:ORDINARY].double()
    products = _Products(len(ordinary), max(experts, 1))
    with products:
        scores = list(run(ordinary))
    values, kinds = [base], ["an ordinary row"] * len(base)

    def add(rows: Tensor, kind: str) -> None:
        values.append(rows.reshape(-1, base.shape[1]))
        kinds.extend([kind] * len(values[-1]))

    for product in _distinct(products.found)[:PRODUCTS]:
        what = "its router's logits" if product.matrix.shape[1] == experts else "a gate's logits"
        along, bounded = _direction(product, ordinary.double())
        if along is None:
            continue
        picked = torch.randint(len(base), (len(LEVELS), 2), generator=generator).to(base.device)
        for level, rows in zip(LEVELS, picked, strict=True):
            if bounded:
                reach = math.copysign(float(base.norm(dim=-1).mean() / along.norm()), level)
                share = abs(level) / LEVELS[-1]
                way = "down" if level < 0 else "up"
                add(share * reach * along + (1 - share) * 0.5 * base[rows], f"a row that steers all of {what} {way}")
            else:
                add(level * along + base[rows], f"a row with all of {what} near {level}")
        for level in (-12, -1, 1, 12):
            add(level * along, f"a row with all of {what} equal")
            add(level * along + 1e-3 * base[:1], f"a row with all of {what} nearly equal")
    if not any(p.matrix.shape[1] == experts for p in products.found):
        for along in _fitted(ordinary.double(), scores, experts):
            for times in (1, 3, 10, 30, 100):
                add(times * along, "a row that steers its router's scores up")
                add(-times * along, "a row that steers its router's scores down")
    steered = SteeredRows("steered router", torch.cat(values), kinds)
    values, kinds = [base], ["an ordinary row"] * len(base)
    add(torch.zeros_like(base[:3]), "a row of zeros")
    add(base[:1].repeat(3, 1), "a copy of another row")
    largest = math.log10(torch.finfo(ordinary.dtype).max) / 2 - math.log10(float(base.abs().max()) or 1.0)
    smallest = math.log10(torch.finfo(ordinary.dtype).tiny) - math.log10(float(base.abs().mean()) or 1.0)
    for power in POWERS:
        if smallest < power < largest:
            add(base[:3] * 10.0**power, f"a row 10^{power} times the ordinary")
    sized = SteeredRows("zero, tiny and huge rows", torch.cat(values), kinds)
    broken = base[:9].clone()
    broken[len(broken) // 2] = math.nan
    kinds = ["a row of NaN" if n == len(broken) // 2 else "a row beside one of NaN" for n in range(len(broken))]
    every = [steered, sized, SteeredRows("a row of NaN beside others", broken, kinds)]
    return [SteeredRows(rows.name, rows.values.to(ordinary.dtype), rows.kinds) for rows in every]


def _direction(product: _Product, ordinary: Tensor) -> tuple[Tensor | None, bool]:
    """(H,): the row that raises every logit by one, and whether a norm bounds how far it reaches; None if unknown."""
    if product.rows.shape != ordinary.shape or not bool(product.rows.isfinite().all()):
        return None, False
    up = torch.linalg.pinv(product.matrix.t()) @ torch.ones(product.matrix.shape[1]).to(product.matrix)
    if torch.allclose(product.rows, ordinary, rtol=1e-2, atol=1e-6 * float(ordinary.abs().max())):
        return up, False
    ratio = product.rows / torch.where(ordinary == 0, 1.0, ordinary)
    gain = (ratio / ratio.abs().mean(-1, keepdim=True).clamp_min(1e-30)).median(0).values
    along = torch.where(gain.abs() > 1e-3, up / torch.where(gain.abs() > 1e-3, gain, 1.0), 0.0)
    return (along, True) if bool(along.any()) and bool(along.isfinite().all()) else (None, False)


def _fitted(ordinary: Tensor, scores: list[Tensor], experts: int) -> Iterator[Tensor]:
    """(H,), as long as an ordinary row: along which the scores of a router that is no product grow, by a linear fit."""
    for found in scores:
        if found.numel() == len(ordinary) * experts and bool(found.isfinite().all()):
            mean = found.double().reshape(len(ordinary), experts).to(ordinary).mean(-1)
            along = torch.linalg.pinv(ordinary) @ (mean - mean.mean())
            if bool(along.isfinite().all()) and float(along.norm()) > 0:
                yield along / along.norm() * ordinary.norm(dim=-1).mean()
            return


def _distinct(products: list[_Product]) -> list[_Product]:
    kept: list[_Product] = []
    for product in products:
        if not any(p.matrix.shape == product.matrix.shape and torch.equal(p.matrix, product.matrix) for p in kept):
            kept.append(product)
    return kept
