"""Attention for a CPU graph with a cache: grouped heads multiply the cached keys and values where they are.

transformers' own forms repeat each key/value head for the query heads that share it and turn the copies about, over
the whole cache and at every token: on 2 cores a decode step of 16 rows spent a third of its time on that. Here the
query heads of a group become rows of one product, so the cache is only read.

Shape legend: B rows, H query heads, G key/value heads, R = H/G, S new tokens, T cached and new ones, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.patches import sdpa_of
from moeopt.value_types import PyObject


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None
) -> tuple[Tensor, None]:
    """``softmax(q k^T * scaling, where the mask allows) v``; a row that may look at nothing gives zeros, as sdpa does.

    Args:
        query: (B, H, S, D), float32; in 16 bits too, for a graph that will compute in float32.
        key, value: (B, G, T, D); a value's D may differ.
        attention_mask: bool (B, 1 or H, S, T); True where a token may look.

    Returns:
        (B, S, H, D) and None, as transformers' attention functions do.
    """
    heads, groups = query.shape[1], key.shape[1]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    q_BGND = (query * scaling).reshape(query.shape[0], groups, -1, query.shape[-1])  # N = R S
    scores_BGNT = torch.matmul(q_BGND, key.transpose(-1, -2))
    scores_BHST = scores_BGNT.reshape(query.shape[0], heads, -1, key.shape[2])
    lowest = torch.finfo(query.dtype).min
    bias = torch.where(attention_mask, 0.0, lowest).to(query.dtype)
    p_BHST = torch.softmax(scores_BHST + bias, dim=-1)
    p_BGNT = p_BHST.reshape(query.shape[0], groups, -1, key.shape[2])
    y_BHSD = torch.matmul(p_BGNT, value).reshape(query.shape[0], heads, -1, value.shape[-1])
    looks = attention_mask.any(dim=-1, keepdim=True)
    return torch.where(looks, y_BHSD, 0.0).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def cache_left_in_place() -> Iterator[None]:
    """While open, models whose attention is "sdpa" run :func:`grouped_attention` where it is the same function."""
    with sdpa_of(_attend):
        yield


def _attend(
    theirs: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: PyObject,
) -> PyObject:
    if attention_mask is not None and _plain(query, key, attention_mask, options):
        return grouped_attention(query, key, value, attention_mask, options.get("scaling"))
    return theirs(module, query, key, value, attention_mask, **options)


_SAME_WITHOUT = ("position_bias", "cache", "softcap", "s_aux")
"""Options that make it another function, unless they are None."""


def _plain(query: Tensor, key: Tensor, mask: Tensor, options: dict[str, Any]) -> bool:
    if mask.dtype != torch.bool or mask.dim() != 4 or query.dim() != 4:
        return False
    if query.shape[1] % key.shape[1] or options.get("dropout"):
        return False
    return all(options.get(name) is None for name in _SAME_WITHOUT)
