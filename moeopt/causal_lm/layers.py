"""What each layer of a ``DynamicCache`` carries from call to call, and such a cache to trace a model with.

Shape legend: B rows, P cached tokens, G key/value heads, D head size. A layer has, by name::

    keys, values (B, G, P, D)    of attention; all tokens are kept, a window is the graph's business
    conv_states.N (B, C, K)      the last K inputs of a causal convolution
    recurrent_states.N (B, ...)  of Mamba, a delta rule and their like

and a layer that has neither (a feed-forward one of a hybrid model) carries nothing.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from moeopt.compat import begin_cache_layer
from moeopt.errors import Declined
from moeopt.value_types import PyObject

ATTENTION = ("keys", "values")
STATES = ("conv_states", "recurrent_states")
KINDS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
"""Classes of transformers whose layers hold nothing else."""


def parts_of(layer: PyObject) -> dict[str, Tensor]:
    """The tensors of a layer of a cache, by name: those that a call has filled."""
    found = {}
    if getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None:
        found = {name: getattr(layer, name) for name in ATTENTION}
    for kind in STATES:
        for number, state in getattr(layer, kind, {}).items():
            if state is not None and layer.has_previous_state[number]:
                found[f"{kind}.{number}"] = state
    return found


def layer_class(parts: Collection[str]) -> PyObject:
    """transformers' own class for a layer that holds parts of these names.

    Raises:
        ImportError: this version of transformers has no such layers.
    """
    states = sum(name not in ATTENTION for name in parts)
    if not parts:
        from transformers.cache_utils import DummyLayer as Found
    elif not states:
        from transformers.cache_utils import DynamicLayer as Found
    elif states == len(parts):
        from transformers.cache_utils import LinearAttentionLayer as Found
    else:
        from transformers.cache_utils import LinearAttentionAndFullAttentionLayer as Found
    return Found


def make_layer(parts: dict[str, Tensor]) -> PyObject:
    """A layer of transformers' own that holds ``parts``.

    Raises:
        ImportError: as :func:`layer_class`.
    """
    numbers = [int(name.rpartition(".")[2]) for name in parts if name not in ATTENTION]
    many = {"number_of_states": 1 + max(numbers)} if numbers else {}
    layer = layer_class(parts)(**many)
    fill_layer(layer, parts)
    return layer


def fill_layer(layer: PyObject, parts: dict[str, Tensor]) -> None:
    """Put ``parts`` in the place of what ``layer``, of the kind that :func:`make_layer` gives for them, holds."""
    if "keys" in parts:
        if not layer.is_initialized:
            begin_cache_layer(layer, parts["keys"], parts["values"])
        layer.keys, layer.values = parts["keys"], parts["values"]
    for name, tensor in parts.items():
        kind, _, number = name.rpartition(".")
        if not kind:
            continue
        getattr(layer, kind)[int(number)] = tensor
        getattr(layer, f"is_{kind}_initialized")[int(number)] = True
        layer.has_previous_state[int(number)] = True
        if kind == "conv_states":
            layer.conv_kernel_size[int(number)] = tensor.shape[-1]
            layer.dtype, layer.device = tensor.dtype, tensor.device


def sample_cache(cache: PyObject, rows: int, past: int) -> PyObject:
    """A ``DynamicCache`` with ``rows`` rows and ``past`` tokens of random values, of the form that ``cache`` has.

    Raises:
        Declined: ``cache``, which a call of the model has filled, is of another kind.
    """
    from transformers import DynamicCache

    if type(cache) is not DynamicCache:
        raise Declined(
            f"its cache is a {type(cache).__name__}; an engine carries a DynamicCache of attention, convolution and "
            "recurrent states"
        )
    sample = DynamicCache()
    for number, layer in enumerate(cache.layers):
        parts = parts_of(layer)
        if type(layer).__name__ not in KINDS or any(parts[n].dim() != 4 for n in ATTENTION if n in parts):
            raise Declined(
                f"layer {number} keeps a {type(layer).__name__}; an engine carries keys and values of attention, and "
                "convolution and recurrent states"
            )
        for name, tensor in parts.items():
            rest = (tensor.shape[1], past, tensor.shape[3]) if name in ATTENTION else tensor.shape[1:]
            parts[name] = torch.randn(rows, *rest).to(tensor)
        sample.layers.append(make_layer(parts))
    if not any("keys" in parts_of(layer) for layer in sample.layers):
        raise Declined("no layer of its cache is attention, so that nothing in it tells how many tokens are cached")
    return sample
