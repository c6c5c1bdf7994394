"""Sizes that are known at run time only: symbols with ranges, and the dimensions that must fit them."""

from __future__ import annotations

from typing import Any

import sympy

from moeopt.errors import BundleError, UsageError
from moeopt.value_types import PyObject


def encode_dim(dim: PyObject) -> int | str | None:
    """A dimension as JSON: an int, a symbol's name, or None for an expression (checked where it is computed)."""
    if isinstance(dim, int):
        return int(dim)
    expr = dim.node.expr
    if isinstance(expr, sympy.Integer):
        return int(expr)
    return str(expr) if isinstance(expr, sympy.Symbol) else None


def encode_ranges(ranges: PyObject, used: set[str]) -> dict[str, list[int | None]]:
    """Symbol -> [least, most]; None where there is no bound. A least of 2 is export's way to say "not special"."""
    out: dict[str, list[int | None]] = {}
    for symbol, bounds in ranges.items():
        if str(symbol) not in used:
            continue
        low, high = (int(b) if b.is_Integer else None for b in (sympy.sympify(bounds.lower), bounds.upper))
        out[str(symbol)] = [low if low is not None and low > 2 else 0, high]
    return out


def check_sizes(
    path: str, shape: tuple[int, ...], dims: list[Any], ranges: dict[str, Any], seen: dict[str, int]
) -> None:
    """Bind the symbols of one input's shape in ``seen``; ``UsageError`` when a size cannot be right."""
    if len(shape) != len(dims):
        raise UsageError(f"{path} has {len(shape)} dimensions, and the bundle takes {len(dims)}")
    for i, (size, dim) in enumerate(zip(shape, dims, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise UsageError(
                f"{path} has size {size} in dimension {i}, and the bundle was exported for {dim} only: "
                "optimise again with example inputs or dynamic dimensions that cover it"
            )
        if not isinstance(dim, str):
            continue
        low, high = ranges.get(dim, [0, None])
        if size < low or (high is not None and size > high):
            way_out = "optimise again with example inputs or dynamic dimensions that cover it"
            if size == 0:
                way_out = "there is nothing to compute for an empty input, so answer such a call without the bundle"
            raise UsageError(
                f"{path} has size {size} in dimension {i}; {dim} may be {low} to {high or 'any size'}: {way_out}"
            )
        if seen.setdefault(dim, size) != size:
            raise UsageError(
                f"{path} has size {size} in dimension {i}, and another input has {seen[dim]} there: both are {dim}"
            )


def check_ranges(ranges: PyObject) -> None:
    """``BundleError`` unless ``ranges`` is what :func:`encode_ranges` writes."""
    if not isinstance(ranges, dict):
        raise BundleError(f"the ranges of sizes are {str(ranges)[:60]!r}, not an object")
    for symbol, bounds in ranges.items():
        good = isinstance(bounds, list) and len(bounds) == 2 and type(bounds[0]) is int
        if not good or not (bounds[1] is None or type(bounds[1]) is int):
            raise BundleError(f"the range of the size {symbol!r:.60} is {bounds!r:.60}, not [least, most]")
