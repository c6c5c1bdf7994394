"""What tests of mixers share: those of a tiny model, and small modules that keep states of their own."""

import functools

import torch
from torch import nn

from moeopt.cache_names import cache_parameter
from moeopt.causal_lm.lm import B, S, _sample
from moeopt.causal_lm.mixers import find_mixers
from moeopt.patches import quiet
from tests.families.build import FAMILIES, Family
from tests.families.configs import SMALL, V5


def found(model):
    """Its mixers, as an export finds them."""
    with quiet():
        sample, _, _ = _sample(model)
        past = cache_parameter(model)
        return find_mixers(model, lambda cache: model(**{**sample, past: cache}), sample[past], (B, S))


@functools.cache
def mixer_of(name):
    """The only mixer of a family's model."""
    (mixer,) = found(FAMILIES[name].build())
    return mixer


THREE_LAYERS = {**FAMILIES["jamba"].config, "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2}
TWICE = Family("jamba", THREE_LAYERS, 1, 4)
"""Jamba with two mixers, which share a graph."""

_GRANITE = {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 24,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
GRANITE = Family("granitemoehybrid", {**SMALL, **_GRANITE}, 2, 6, min_version=V5)
"""Granite 4's hybrid: Mamba 2 and attention."""


class Sums(nn.Module):
    """Running sums in the recurrent state of layer 0."""

    layer = 0

    def forward(self, x, cache):
        layer = cache.layers[self.layer]
        total = layer.recurrent_states[0][:, None] + x.cumsum(1)
        layer.update_recurrent_state(total[:, -1])
        return total


class Around(nn.Module):
    """A model with one mixer in it, which ``call`` runs."""

    def __init__(self, mixer, call=lambda mixer, x, cache: mixer(x, cache)):
        super().__init__()
        self.mixer, self.call = mixer, call

    def forward(self, x, cache):
        return self.call(self.mixer, x, cache)


def summing_cache(layers=1):
    """A cache with sums (2, 4) of each layer."""
    from transformers import DynamicCache

    from moeopt.causal_lm.layers import make_layer

    cache = DynamicCache()
    cache.layers = [make_layer({"recurrent_states.0": torch.ones(2, 4) * n}) for n in range(1, layers + 1)]
    return cache
