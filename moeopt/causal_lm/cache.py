"""Caches in and out of an engine: a transformers ``DynamicCache``, or a list of tuples of tensors without it.

Shape legend: B rows, G key/value heads, P cached tokens, D head size; keys and values are (B, G, P, D), the states of
:mod:`~.layers` (B, ...). An engine keeps every token of every layer: attention windows are in its graph's masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.causal_lm.layers import fill_layer, layer_class, make_layer, parts_of
from moeopt.errors import UsageError
from moeopt.value_types import PyObject

Parts = dict[str, Tensor]
"""What a layer carries, by name."""


def read_cache(cache: PyObject, layers: Sequence[Mapping[str, Any]], rows: int, device: torch.device) -> list[Parts]:
    """What each layer carries; no tokens and states of zero for a cache that is None or new.

    Args:
        layers: the parts of each layer as the signature describes them.

    Raises:
        UsageError: the cache is of another kind, another model, another batch, or was cut to a window.
    """
    found = _parts(cache, layers)
    if not any(found):
        return [{name: _empty(part, rows, device) for name, part in layer.items()} for layer in layers]
    if len(found) != len(layers):
        raise UsageError(f"past_key_values has {len(found)} layers; the model has {len(layers)}")
    length = past_length(found)
    for number, (parts, layer) in enumerate(zip(found, layers, strict=True)):
        for name, at in layer.items():
            wanted = tuple(_shape(at, rows, length))
            part = parts.get(name)
            given: PyObject = tuple(part.shape) if isinstance(part, Tensor) else "nothing"
            if isinstance(part, Tensor) and str(part.dtype) != f"torch.{at['dtype']}":
                raise UsageError(
                    f"past_key_values: layer {number} has {name} in {str(part.dtype).removeprefix('torch.')}, and the "
                    f"engine's cache is {at['dtype']}"
                )
            if given != wanted:
                raise UsageError(
                    f"past_key_values: layer {number} has {name} of {given} where {wanted} is needed; "
                    "pass the cache that the engine returned"
                )
    return found


def past_length(cache: Sequence[Parts]) -> int:
    """P: how many tokens the attention layers keep."""
    found = [parts.get("keys") for parts in cache]
    return max([int(keys.shape[2]) for keys in found if isinstance(keys, Tensor) and keys.dim() == 4], default=0)


def write_cache(cache: PyObject, grown: Sequence[Parts]) -> PyObject:
    """``cache`` with new keys, values and states, changed in place as the model would; a new one for None.

    Raises:
        UsageError: the installed transformers has no cache for such states.
    """
    plain = [tuple(parts.values()) for parts in grown]
    try:
        from transformers import DynamicCache
    except ImportError:
        return plain
    if isinstance(cache, list | tuple):
        return plain
    cache = DynamicCache() if cache is None else cache
    try:
        wanted = [layer_class(parts) for parts in grown]
    except ImportError as err:
        raise UsageError(
            "this version of transformers has no cache with recurrent states, which the engine carries: "
            "pip install 'transformers>=5.23'"
        ) from err
    if [type(layer) for layer in cache.layers] != wanted:
        cache.layers = [make_layer(parts) for parts in grown]  # a window is the graph's business
        return cache
    for layer, parts in zip(cache.layers, grown, strict=True):
        fill_layer(layer, parts)
    return cache


def _parts(cache: PyObject, layers: Sequence[Mapping[str, Any]]) -> list[Parts]:
    if cache is None:
        return []
    if isinstance(cache, list | tuple):
        if len(cache) != len(layers):
            raise UsageError(f"past_key_values has {len(cache)} layers; the model has {len(layers)}")
        return [dict(zip(layer, tensors, strict=False)) for layer, tensors in zip(layers, cache, strict=True)]
    found = getattr(cache, "layers", None)
    name = type(cache).__name__
    if found is None or name != "DynamicCache":
        raise UsageError(f"past_key_values is a {name}; the engine takes a DynamicCache, or none to begin with")
    if any(getattr(layer, "record_past", False) for layer in found):
        raise UsageError("past_key_values records its past states to be cropped; the engine keeps the last ones only")
    held = [parts_of(layer) for layer in found]
    for number, (layer, parts) in enumerate(zip(found, held, strict=True)):
        if "keys" in parts and layer.get_seq_length() != parts["keys"].shape[2]:
            raise UsageError(
                f"past_key_values: layer {number} has seen {layer.get_seq_length()} tokens and keeps "
                f"{parts['keys'].shape[2]}, cut to its window; the engine keeps all: begin with the engine's own cache"
            )
    return held


def _shape(at: Mapping[str, Any], rows: int, length: int) -> list[int]:
    return [rows, *at["shape"]] if "shape" in at else [rows, at["heads"], length, at["size"]]


def _empty(at: Mapping[str, Any], rows: int, device: torch.device) -> Tensor:
    return torch.zeros(_shape(at, rows, 0), dtype=getattr(torch, at["dtype"]), device=device)
