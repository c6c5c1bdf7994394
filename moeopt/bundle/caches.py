"""A cache of keys and values among a model's results, as tensors that exporters see and a bundle rebuilds.

Shape legend: B rows, G key/value heads, S tokens, D head size. A layer is ``(keys, values)``, each (B, G, S, D).

transformers models that do not generate (classifiers) return the cache that the call filled as well. ``torch.export``
does not know the class, and transformers registers it with torch only in exporters of its own. So a result is traced
with :class:`KeyValues` in the place of each ``DynamicCache``, and an engine makes a ``DynamicCache`` of it again.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import torch.utils._pytree as pytree

from moeopt.capture.tree import tree_map
from moeopt.compat import begin_cache_layer
from moeopt.errors import BundleError
from moeopt.value_types import PyObject


class KeyValues:
    """What the layers of a ``DynamicCache`` hold: [(keys, values)], (B, G, S, D) each."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = layers


NAME = f"{KeyValues.__module__}:{KeyValues.__qualname__}"
"""How the structure of a result names it."""


def opened(result: PyObject) -> PyObject:
    """``result`` with a :class:`KeyValues` for each plain ``DynamicCache`` in it; a cache of another kind stays."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:  # nobody made a cache
        return result

    def parts(cache: PyObject) -> PyObject:
        plain = type(cache) is module.DynamicCache and getattr(cache, "layer_class_to_replicate", cache) is None
        if not plain or any(type(layer) is not module.DynamicLayer or layer.keys is None for layer in cache.layers):
            return cache
        return KeyValues([(layer.keys, layer.values) for layer in cache.layers])

    return tree_map(module.DynamicCache, parts, result)


def result_leaves(result: PyObject) -> list[Any]:
    """The leaves of a model's result, in order, those of its caches among them."""
    return pytree.tree_leaves(opened(result))


def cache_reason(name: str) -> str:
    """Why a result with a cache of the class ``name`` has no form in an engine, and the way out."""
    return (
        f"its result holds a {name}, and an engine returns caches of plain keys and values only: add use_cache=False "
        "to the example inputs, and to the calls of the engine"
    )


def rebuilt(layers: PyObject) -> PyObject:
    """The ``DynamicCache`` that holds ``layers``; a :class:`KeyValues` where transformers is not installed.

    Raises:
        BundleError: ``layers`` are no pairs of tensors.
    """
    pairs = [tuple(layer) if isinstance(layer, (tuple, list)) else () for layer in layers]
    if any(len(pair) != 2 or not all(isinstance(t, torch.Tensor) for t in pair) for pair in pairs):
        raise BundleError("a cache in the result must hold a pair of tensors for each layer")
    try:
        transformers = importlib.import_module("transformers.cache_utils")
    except ImportError:
        return KeyValues([(keys, values) for keys, values in pairs])
    cache = transformers.DynamicCache()
    cache.layer_class_to_replicate = None  # as in the cache that a model makes: for just these layers
    for keys, values in pairs:
        layer = transformers.DynamicLayer()
        begin_cache_layer(layer, keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


pytree.register_pytree_node(
    KeyValues,
    lambda cache: ([cache.layers], ["layers"]),
    lambda parts, names: KeyValues(*parts),
    serialized_type_name=NAME,
    flatten_with_keys_fn=lambda cache: ([(pytree.GetAttrKey("layers"), cache.layers)], ["layers"]),
)
