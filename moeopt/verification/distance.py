"""How far an output is from the float64 truth, one token at a time.

A token is a row: all dims but the last are tokens, the last holds features; a scalar or a vector is
one token. Where a block's outputs have their features elsewhere (an image's channels), ``features_last``
turns them. The distance of token t is ``|y_t - o_t| / |o_t|`` in float64, L2 norms. A row ``eps`` times
smaller than the root mean square row carries no digits, so the denominator stops there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def as_rows(y: Tensor) -> Tensor:
    """``y`` as (tokens, features) in float64 (complex128 for complex)."""
    y = y.detach().to(torch.complex128 if y.dtype.is_complex else torch.float64)
    return y.reshape(1, -1) if y.dim() < 2 else y.reshape(-1, y.shape[-1])


def features_last(y: Tensor, features: int | None) -> Tensor:
    """``y`` with its one axis of ``features`` numbers as the last, the rows of other axes being tokens.

    Itself where the last axis has so many, or not exactly one axis has; None or 1: it is the last.
    """
    axes = [axis for axis, size in enumerate(y.shape) if size == features]
    return y.movedim(axes[0], -1) if len(axes) == 1 and features != 1 and y.dim() > 2 else y


def token_distance(y: Tensor, oracle: Tensor, *, eps: float | None = None) -> Tensor:
    """Relative L2 distance per token, float64, shape (tokens,); NaN where either row is not finite.

    Args:
        y: the output to judge, any dtype. oracle: the same shape, float64.
        eps: of the dtype the output was computed in; by default that of ``y``.
    """
    y_TF, o_TF = as_rows(y), as_rows(oracle)
    if eps is None:
        eps = torch.finfo(y.dtype).eps
    good = finite_rows(y_TF) & finite_rows(o_TF)
    # Dividing both by the largest entry keeps float64 squares from overflowing.
    big = o_TF[good].abs().amax() if good.any() and o_TF.shape[1] else o_TF.new_tensor(0.0)
    big = big.real if big.is_complex() else big
    unit = 1.0 if not big else 1.0 / float(big)
    norm = torch.linalg.vector_norm(o_TF * unit, dim=1)
    gap = torch.linalg.vector_norm((y_TF - o_TF) * unit, dim=1)
    floor = eps * float(norm[good].square().mean().sqrt()) if good.any() else 0.0
    distance = gap / norm.clamp_min(max(floor, torch.finfo(torch.float64).tiny))
    return torch.where(good, distance, torch.nan)


def finite_rows(y_TF: Tensor) -> Tensor:
    """Which rows hold finite values only, (tokens,) bool."""
    return torch.isfinite(y_TF).all(dim=1)


@dataclass(frozen=True)
class Finiteness:
    """Rows by whether original and rewritten are finite: ``leaked`` and ``healed`` are row numbers.

    ``leaked``: finite in the original and not in the rewritten. ``healed_nan``: the original holds a
    NaN, the rewritten is finite (a dense form's 0 * inf). ``healed_inf``: the original holds an
    infinity and no NaN, the rewritten is finite (an overflow that did not happen).
    """

    both: Tensor
    leaked: list[int]
    healed_nan: list[int]
    healed_inf: list[int]


def finiteness(original: Tensor, rewritten: Tensor) -> Finiteness:
    """Compare the finite pattern of two outputs of the same shape, row by row."""
    o_TF, r_TF = as_rows(original), as_rows(rewritten)
    o_ok, r_ok = finite_rows(o_TF), finite_rows(r_TF)
    has_nan = torch.isnan(o_TF).any(dim=1)
    healed = ~o_ok & r_ok
    return Finiteness(
        both=o_ok & r_ok,
        leaked=(o_ok & ~r_ok).nonzero().flatten().tolist(),
        healed_nan=(healed & has_nan).nonzero().flatten().tolist(),
        healed_inf=(healed & ~has_nan).nonzero().flatten().tolist(),
    )
