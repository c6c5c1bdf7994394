"""Ids that name every expert on each row, 0, 1 ... E - 1: made once for each size, and known again by that.

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 64
"""Sizes that are kept."""

FEW = 64
"""Ids up to which Python looks at each sooner than PyTorch is called."""

_kept: dict[tuple[int, ...], Tensor] = {}


def every_ids(tokens: int, experts: int) -> Tensor:
    """(T, E) int64 on the CPU; each row is the same memory, which is not to be written to."""
    ids_TE = _kept.get((tokens, experts))
    if ids_TE is None:
        if len(_kept) >= MOST:
            _kept.clear()
        with torch.inference_mode(False):  # the op's backward may have to keep them
            ids_TE = torch.arange(experts, device="cpu").expand(tokens, experts)
        if torch._C._functorch.peek_interpreter_stack() is None:  # else it is a wrapper, which ends with the transform
            _kept[tokens, experts] = ids_TE
    return ids_TE


def is_kept(ids_TE: Tensor) -> bool:
    """Whether it is a result of :func:`every_ids`."""
    return _kept.get(tuple(ids_TE.shape)) is ids_TE


def names_every(ids_TK: Tensor, experts: int) -> bool:
    """Whether each row of ids is 0, 1 ... E - 1, in this order, and there is a row."""
    if is_kept(ids_TK):
        return ids_TK.shape[1] == experts and len(ids_TK) > 0
    T, K = ids_TK.shape
    if experts != K or not T:
        return False
    every = list(range(experts))
    if T > 1 and T * K <= FEW:
        return bool(ids_TK.tolist() == [every] * T)
    if ids_TK[0].tolist() != every:
        return False
    return T == 1 or ids_TK.stride(0) == 0 or bool((ids_TK == torch.arange(K, device=ids_TK.device)).all())
