"""Caches in and out of an engine: a transformers ``DynamicCache``, or a list of (keys, values) without it.

Shape legend: B rows, G key/value heads, P cached tokens, D head size; keys and values are (B, G, P, D).
An engine keeps every token of every layer: attention windows are in its graph's masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import UsageError

Pair = tuple[Tensor, Tensor]


def read_cache(cache: Any, layers: Sequence[Mapping[str, Any]], rows: int, device: torch.device) -> list[Pair]:
    """Keys and values of each layer; tensors with no tokens for a cache that is None or new.

    Raises:
        UsageError: the cache is of another kind, another model, another batch, or was cut to a window.
    """
    found = _pairs(cache)
    if not found:
        return [(_empty(layer["keys"], rows, device), _empty(layer["values"], rows, device)) for layer in layers]
    if len(found) != len(layers):
        raise UsageError(f"past_key_values has {len(found)} layers; the model has {len(layers)}")
    length = max(keys.shape[2] for keys, _ in found)
    for number, (pair, layer) in enumerate(zip(found, layers, strict=True)):
        for tensor, at in zip(pair, (layer["keys"], layer["values"]), strict=True):
            wanted = (rows, at["heads"], length, at["size"])
            if tuple(tensor.shape) != wanted:
                raise UsageError(
                    f"past_key_values: layer {number} has shape {tuple(tensor.shape)} where {wanted} is needed; "
                    "pass the cache that the engine returned"
                )
    return found


def write_cache(cache: Any, grown: Sequence[Pair]) -> Any:
    """``cache`` with new keys and values, changed in place as the model would; a new one for None."""
    try:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer
    except ImportError:
        return list(grown)
    if isinstance(cache, (list, tuple)):
        return list(grown)
    cache = DynamicCache() if cache is None else cache
    if len(cache.layers) != len(grown) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        cache.layers = [DynamicLayer() for _ in grown]  # a window is the graph's business
    for layer, (keys, values) in zip(cache.layers, grown, strict=True):
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def _pairs(cache: Any) -> list[Pair]:
    if cache is None:
        return []
    if isinstance(cache, (list, tuple)):
        return [(keys, values) for keys, values in cache]
    layers = getattr(cache, "layers", None)
    name = type(cache).__name__
    if layers is None or name != "DynamicCache":
        raise UsageError(f"past_key_values is a {name}; the engine takes a DynamicCache, or none to begin with")
    full = [layer for layer in layers if getattr(layer, "is_initialized", False) and layer.keys.numel()]
    if not full:
        return []
    return [(layer.keys, layer.values) for layer in layers if layer.keys is not None]


def _empty(at: Mapping[str, Any], rows: int, device: torch.device) -> Tensor:
    return torch.empty(rows, at["heads"], 0, at["size"], dtype=getattr(torch, at["dtype"]), device=device)
