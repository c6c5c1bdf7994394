"""Layers of a cache as named tensors, there and back."""

import pytest
import torch

pytest.importorskip("transformers.exporters")  # versions that have it have layers with states

from transformers import DynamicCache, cache_utils

from moeopt.causal_lm.layers import fill_layer, make_layer, parts_of, sample_cache
from moeopt.errors import Declined

ATTENTION = {"keys": (2, 4, 5, 8), "values": (2, 4, 5, 6)}
STATES = {"conv_states.0": (2, 7, 4), "recurrent_states.0": (2, 3, 8, 8)}
LAYERS = {
    "attention": (ATTENTION, "DynamicLayer"),
    "convolution": ({"conv_states.0": (2, 7, 4)}, "LinearAttentionLayer"),
    "states": (STATES, "LinearAttentionLayer"),
    "second state": (
        {**STATES, "conv_states.1": (2, 5, 3), "recurrent_states.1": (2, 9)},
        "LinearAttentionLayer",
    ),
    "only the second": ({"recurrent_states.1": (2, 9)}, "LinearAttentionLayer"),
    "both": ({**ATTENTION, **STATES}, "LinearAttentionAndFullAttentionLayer"),
    "nothing": ({}, "DummyLayer"),
}


def tensors(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", LAYERS)
def test_there_and_back(kind):
    shapes, name = LAYERS[kind]
    parts = tensors(shapes)
    layer = make_layer(parts)
    assert type(layer).__name__ == name
    for given in (parts, tensors(shapes, seed=1)):
        fill_layer(layer, given)
        found = parts_of(layer)
        assert found.keys() == given.keys() and all(found[part] is given[part] for part in given)


@pytest.mark.parametrize("kind", ["states", "both", "attention"])
def test_a_layer_that_no_call_has_filled_has_no_parts(kind):
    layer = type(make_layer(tensors(LAYERS[kind][0])))()
    assert parts_of(layer) == {}


def test_transformers_goes_on_from_a_made_layer_as_from_its_own():
    new = tensors({"keys": (2, 4, 2, 8), "values": (2, 4, 2, 6), "conv": (2, 7, 2), "recurrent": (2, 3, 8, 8)}, seed=2)
    first, after = tensors({**ATTENTION, **STATES}), []
    own = cache_utils.LinearAttentionAndFullAttentionLayer()
    own.update(first["keys"], first["values"])
    own.update_conv_state(first["conv_states.0"].clone())
    own.update_recurrent_state(first["recurrent_states.0"].clone())
    for layer in (own, make_layer({name: tensor.clone() for name, tensor in first.items()})):
        keys, values = layer.update(new["keys"], new["values"])
        window = layer.update_conv_state(new["conv"])
        layer.update_recurrent_state(new["recurrent"])
        layer.reorder_cache(torch.tensor([1, 1]))
        after.append([keys, values, window, *parts_of(layer).values()])
    assert len(after[0]) == 7 and all(map(torch.equal, *after))


def test_a_sample_has_the_form_and_other_numbers():
    cache = DynamicCache()
    cache.layers = [make_layer(tensors(shapes)) for shapes, _ in LAYERS.values()]
    sample = sample_cache(cache, 3, 11)
    assert [type(layer) for layer in sample.layers] == [type(layer) for layer in cache.layers]
    for layer, own in zip(sample.layers, cache.layers, strict=True):
        parts, before = parts_of(layer), parts_of(own)
        assert parts.keys() == before.keys()
        for name, tensor in parts.items():
            rest = list(before[name].shape[1:])
            if name in ATTENTION:
                rest[1] = 11
            assert list(tensor.shape) == [3, *rest] and tensor.dtype == before[name].dtype
            assert tensor.std() > 0.1  # random: zeros would hide what a trace does not read
    assert sample.get_seq_length() == 11


def test_a_window_becomes_a_layer_that_keeps_all():
    cache = DynamicCache()
    layer = cache_utils.DynamicSlidingWindowLayer(sliding_window=4)
    layer.update(*tensors(ATTENTION).values())
    cache.layers = [layer]
    (made,) = sample_cache(cache, 2, 9).layers
    assert type(made).__name__ == "DynamicLayer" and made.keys.shape[2] == 9


def test_another_cache_is_declined():
    class Own(DynamicCache):
        pass

    with pytest.raises(
        Declined,
        match="its cache is a Own; an engine carries a DynamicCache of attention, convolution and recurrent states",
    ):
        sample_cache(Own(), 2, 3)


def test_another_layer_is_declined():
    class Odd(cache_utils.DynamicLayer):
        pass

    cache, odd = DynamicCache(), Odd()
    odd.update(*tensors(ATTENTION).values())
    cache.layers = [make_layer(tensors(ATTENTION)), odd]
    text = "layer 1 keeps a Odd; an engine carries keys and values of attention, and convolution and recurrent states"
    with pytest.raises(Declined, match=text):
        sample_cache(cache, 2, 3)


def test_keys_without_heads_are_declined():
    cache = DynamicCache()
    cache.layers = [make_layer(tensors({"keys": (2, 5, 8), "values": (2, 5, 8)}))]
    with pytest.raises(Declined, match="layer 0 keeps a DynamicLayer; an engine carries"):
        sample_cache(cache, 2, 3)


def test_states_alone_are_declined():
    cache = DynamicCache()
    cache.layers = [make_layer(tensors(STATES)), make_layer({})]
    text = "no layer of its cache is attention, so that nothing in it tells how many tokens are cached"
    with pytest.raises(Declined, match=text):
        sample_cache(cache, 2, 3)
