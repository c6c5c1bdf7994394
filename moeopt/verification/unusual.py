"""The given call with rows that no example is likely to have, for a whole model: zeros, tiny, huge and broken rows.

Of a language model only the token ids and the mask can be chosen: one and the same token everywhere, and padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeopt.capture.tree import ArgsKwargs
from moeopt.value_types import PyObject
from moeopt.verification.language import find_ids


def unusual_calls(call: ArgsKwargs) -> list[tuple[str, ArgsKwargs]]:
    """What each call shows, and the call, of the sizes of the given one."""
    leaves, spec = pytree.tree_flatten((tuple(call[0]), dict(call[1])))
    rows = next((n for n, t in enumerate(leaves) if _holds_rows(t)), None)

    def with_leaf(changes: dict[int, Tensor]) -> ArgsKwargs:
        args, kwargs = pytree.tree_unflatten([changes.get(n, leaf) for n, leaf in enumerate(leaves)], spec)
        return args, kwargs

    if rows is not None:
        return [(what, with_leaf({rows: value})) for what, value in _rows_of(leaves[rows])]
    ids = find_ids(*call)
    if ids is None or ids.shape[1] < 2:
        return []
    at = next(n for n, leaf in enumerate(leaves) if leaf is ids)
    changes = {at: ids[:, :1].expand_as(ids).clone()}
    masks = [n for n, t in enumerate(leaves) if n != at and isinstance(t, Tensor) and t.shape == ids.shape]
    padded = [n for n in masks if not leaves[n].is_floating_point() and bool((leaves[n] == 1).all())]
    for n in padded[:1]:
        changes[n] = leaves[n].clone()
        changes[n][:, -(-ids.shape[1] // 2) :] = 0
    return [(f"one token repeated{', half of it padding' if padded else ''}", with_leaf(changes))]


def _holds_rows(leaf: PyObject) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 2 and leaf.numel() > 0


def _rows_of(given: Tensor) -> list[tuple[str, Tensor]]:
    half = given.dtype == torch.float16  # its smallest normal number is 6e-5, its largest 65504
    small, large = (1e-3, 64.0) if half else (1e-5, 1e3)
    count = math.prod(given.shape[:-1])
    factors = torch.ones(count)
    factors[(1 if count > 1 else 0) :: 3], factors[2::3] = 0.0, small
    scaled = given * factors.view(*given.shape[:-1], 1).to(given)
    calls = [("rows of zeros and tiny rows", scaled), ("huge rows", given * large)]
    if given.shape[0] > 1:
        broken = given.clone()
        broken[(-1,) * (given.dim() - 1)] = math.nan
        calls.append(("a row of NaN", broken))
    return calls
