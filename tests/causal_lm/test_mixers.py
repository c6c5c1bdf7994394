"""Which modules keep a recurrent state, found by what they do, and their stand-ins while a model is traced."""

import copy

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers.exporters")

from moeopt.cache_names import cache_parameter
from moeopt.causal_lm.layers import parts_of
from moeopt.causal_lm.lm import B, S, _sample
from moeopt.causal_lm.mixers import find_mixers, stepping
from moeopt.errors import Declined
from tests.causal_lm.hybrids import TWICE, Around, Sums, found, mixer_of, summing_cache
from tests.families.build import FAMILIES


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("jamba", "model.layers.0.mamba"),
        ("qwen3_next", "model.layers.0.linear_attn"),
        ("nemotron_h", "model.layers.0.mixer"),
    ],
)
def test_finds_the_mixer(name, path):
    mixer = mixer_of(name)
    assert (mixer.name, mixer.layer) == (path, 0)
    assert mixer.states == ["conv_states.0", "recurrent_states.0"]
    tokens, states = mixer.sample()
    assert all(t.shape[:2] == (B, S) for t in tokens) and [len(state) for state in states] == [B, B]
    assert [tuple(end.shape) for end in mixer.ends if isinstance(end, torch.Tensor)] == [(B, S, 32)]


def test_finds_each_of_several_in_order():
    assert [(m.name, m.layer) for m in found(TWICE.build())] == [
        ("model.layers.0.mamba", 0),
        ("model.layers.1.mamba", 1),
    ]


@pytest.mark.parametrize("name", ["lfm2_moe", "mixtral"])
def test_convolutions_and_attention_alone_are_none(name):
    assert found(FAMILIES[name].build()) == []


def test_leaves_no_hooks_and_the_cache_as_it_was():
    model = FAMILIES["qwen3_next"].build()
    sample, _, _ = _sample(model)
    past = cache_parameter(model)
    cache = sample[past]
    before = [{name: tensor.clone() for name, tensor in parts_of(layer).items()} for layer in cache.layers]
    find_mixers(model, lambda given: model(**{**sample, past: given}), cache, (B, S))
    for layer, parts in zip(cache.layers, before, strict=True):
        assert parts_of(layer).keys() == parts.keys()
        assert all(torch.equal(parts_of(layer)[name], tensor) for name, tensor in parts.items())
        assert all(type(getattr(layer, kind, {})) is dict for kind in ("conv_states", "recurrent_states"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def find(model, layers=1, x=None):
    cache = summing_cache(layers)
    x = torch.ones(2, 3, 4) if x is None else x
    return find_mixers(model, lambda given: model(x, given), cache, (2, 3))


def test_leaves_no_hooks_where_it_declines():
    model = Around(Sums(), lambda mixer, x, cache: mixer(mixer(x, cache), cache))
    with pytest.raises(Declined, match="mixer keeps a recurrent state and is called twice"):
        find(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Both(Sums):
    def forward(self, x, cache):
        y = super().forward(x, cache)
        return y + cache.layers[1].recurrent_states[0][:, None]


class Last(Sums):
    def forward(self, x, cache):
        return super().forward(x, cache)[:, -1]


class Scaled(Sums):
    def forward(self, x, cache, scale=None):
        return super().forward(x if scale is None else x * scale, cache)


class OfLayer(Sums):
    def forward(self, x, layer):
        y = x + layer.recurrent_states[0][:, None]
        layer.update_recurrent_state(y[:, -1])
        return y


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Around(Both()), "works on 2 layers of 1 caches"),
        (Around(OfLayer(), lambda m, x, cache: m(x, cache.layers[0])), "works on 1 layers of 0 caches"),
        (
            Around(Scaled(), lambda m, x, cache: m(x, cache, x[:, 0, :1, None])),
            r"takes a tensor \(2, 1, 1\) that has not one row for each of 3 tokens",
        ),
        (
            Around(Scaled(), lambda m, x, cache: m(x, cache, torch.ones(4))),
            r"takes a tensor \(4,\) that has not one row for each of 3 tokens",
        ),
        (Around(Last()), r"returns a tensor \(2, 4\) that has not one row for each of 3 tokens"),
    ],
    ids=["two layers", "no cache", "one row", "no rows", "result"],
)
def test_declines_with_the_module_and_the_reason(model, text):
    with pytest.raises(Declined, match=f"^mixer keeps a recurrent state and {text}$"):
        find(model, layers=2)


def test_a_module_that_fits_is_found():
    (mixer,) = find(Around(Scaled(), lambda m, x, cache: m(x, cache, scale=torch.ones(1, 3, 1))))
    tokens, states = mixer.sample()
    assert [tuple(t.shape) for t in tokens] == [(2, 3, 4), (2, 3, 1)]  # a tensor of one row stands for all
    assert [tuple(state.shape) for state in states] == [(2, 4)]


def test_other_arguments_in_the_trace_are_declined_and_forward_comes_back():
    model = Around(Scaled())
    mixers = find(model)
    cache, x = summing_cache(), torch.ones(2, 3, 4)
    want = model(x, copy.deepcopy(cache))
    with pytest.raises(Declined, match="mixer is called with other arguments while it is traced"), stepping(mixers):
        mixers[0].module(x, cache, scale=x)
    assert "forward" not in vars(mixers[0].module)
    assert torch.equal(model(x, cache), want)


def test_a_forward_of_the_instance_comes_back():
    model = Around(Sums())
    mixers = find(model)
    own = mixers[0].module.forward
    mixers[0].module.forward = own
    with stepping(mixers):
        assert vars(mixers[0].module)["forward"] is not own
    assert vars(mixers[0].module)["forward"] is own
