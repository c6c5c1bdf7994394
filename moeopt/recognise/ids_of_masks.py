"""Ids (T, K) from masks and tables over the experts, as ops that run in a rewritten block."""

from __future__ import annotations

import torch

from moeopt.ops.every_ids import FEW, every_ids


def mask_to_ids(onehot_TKE: torch.Tensor) -> torch.Tensor:
    """(T, K) index of the one in each row; E where a row has none."""
    hit = onehot_TKE != 0
    return torch.where(hit.any(-1), hit.to(torch.uint8).argmax(-1), hit.shape[-1])


def mask_to_slots(mask_TKE: torch.Tensor) -> torch.Tensor:
    """(T, K * E) the expert of each entry that is set, E where it is not: right for any number of them."""
    experts = mask_TKE.shape[-1]
    return torch.where(mask_TKE != 0, torch.arange(experts, device=mask_TKE.device), experts).flatten(1)


def for_each_slot(weights_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """(T, K * E) the weight of each entry that :func:`mask_to_slots` made."""
    return weights_TK.unsqueeze(-1).expand(-1, -1, experts).flatten(1)


def one_beyond(weights_TK: torch.Tensor, ids_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """The weights, with one for an id that names no expert: a dropped token passes through as it is."""
    return torch.where(ids_TK >= experts, 1.0, weights_TK)


def ids_not_zero(ids_TK: torch.Tensor, weights_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """The ids, E (which adds nothing) where the weight is zero: 0 times what overflowed is no zero."""
    return torch.where(weights_TK != 0, ids_TK, experts)


def ids_positive(ids_TK: torch.Tensor, weights_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """The same where the weight is not above zero, as that of a NaN."""
    return torch.where(weights_TK > 0, ids_TK, experts)


def positive_to_ids(table_TE: torch.Tensor) -> torch.Tensor:
    """(T, E) expert e in column e where its weight is above zero, E (which adds nothing) elsewhere."""
    experts = table_TE.shape[-1]
    return torch.where(table_TE > 0, torch.arange(experts, device=table_TE.device), experts)


def table_to_ids(table_TE: torch.Tensor) -> torch.Tensor:
    """(T, E) expert e in column e where its weight is not zero, E (which adds nothing) elsewhere.

    Where no weight is zero, as of a softmax over all experts, each row is the same memory: see ``every_ids``.
    """
    experts = table_TE.shape[-1]
    if _looked_at(table_TE) and table_TE.dim() == 2:
        tokens = table_TE.shape[0]
        ids_TE = every_ids(tokens, experts)
        if all(map(all, table_TE.tolist())) if tokens * experts <= FEW else table_TE.all():
            return ids_TE
        return ids_TE.masked_fill(table_TE == 0, experts)
    return torch.where(table_TE != 0, torch.arange(experts, device=table_TE.device), experts)


def _looked_at(table_TE: torch.Tensor) -> bool:
    """Whether code may branch on numbers: nothing is traced, and no GPU would be waited for."""
    return not torch.compiler.is_compiling() and (
        type(table_TE) is torch.Tensor
        and table_TE.device.type == "cpu"
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def kept_ids(ids_TK: torch.Tensor, mask: torch.Tensor, experts: int, slots_first: bool = False) -> torch.Tensor:
    """(T, K) ids with E, which adds nothing, where ``mask`` is not above zero (not set, or NaN).

    Args:
        mask: T * K entries in the order of (T, K), in that of (K, T) with ``slots_first``; or one for each token.
    """
    if mask.dtype == torch.bool:
        mask = mask.to(torch.int8)
    each = mask.reshape(ids_TK.shape[1], -1).t() if slots_first else mask.reshape(ids_TK.shape[0], -1)
    return torch.where(each > 0, ids_TK, experts)
