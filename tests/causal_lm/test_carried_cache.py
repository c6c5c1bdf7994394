"""Alike layers with a cache, in a plain export: one of a kind is traced; one that does more with it is not stamped."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

pytest.importorskip("transformers.exporters")

from transformers import DynamicCache
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

from moeopt.causal_lm.carried_cache import CarriedCache
from moeopt.causal_lm.layers import sample_cache
from moeopt.lower.functional import _run, without_writes
from moeopt.lower.layer_calls import NotStampable
from moeopt.lower.stamp_graph import write_out
from moeopt.lower.stamps import Stamps
from moeopt.patches import no_results_kept

H = 8


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.norm = number, nn.LayerNorm(H)
        self.q, self.k, self.v, self.o = (nn.Linear(H, H) for _ in range(4))

    def forward(self, x, cache, mask):
        h = self.norm(x)
        q, k, v = (f(h)[:, None] for f in (self.q, self.k, self.v))
        k, v = self.filled(cache, k, v)
        return x + self.o(F.softmax(q @ k.transpose(-1, -2) + mask, -1) @ v)[:, 0]

    def filled(self, cache, k, v):
        return cache.update(k, v, self.number)


class Decoder(nn.Module):
    def __init__(self, kind=Layer, count=4):
        super().__init__()
        self.layers = nn.ModuleList(kind(n) for n in range(count))

    def forward(self, x, mask, cache):
        for layer in self.layers:
            x = layer(x, cache=cache, mask=mask)
        return x, [(layer.keys, layer.values) for layer in cache.layers]


def made(kind=Layer, count=4, decoder=Decoder):
    torch.manual_seed(0)
    model = decoder(kind, count).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    register_cache_pytrees_for_model(model)
    return model


def call(count, rows=2, new=3, past=5):
    torch.manual_seed(rows + new + past)
    cache = DynamicCache()
    for n in range(count):
        cache.update(torch.randn(rows, 1, past, H), torch.randn(rows, 1, past, H), n)
    return torch.randn(rows, new, H), torch.randn(rows, 1, new, past + new), sample_cache(cache, rows, past)


def exported(model, stamps):
    """One trace of a model."""
    x, mask, cache = call(len(model.layers))
    free = [{0: Dim.AUTO, 2: Dim.AUTO} for _ in pytree.tree_leaves(cache)]
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, free)
    with torch.no_grad(), no_results_kept(), stamps.during():
        return torch.export.export(model, (x, mask, cache), dynamic_shapes=shapes, strict=False)


def traced(model, left_alone=frozenset()):
    """The functional program of a model, and its stamps; each class that cannot be stamped is left alone, as it is
    where engines are made."""
    stamps = Stamps(model, left_alone, carrier=CarriedCache())
    try:
        program = exported(model, stamps)
        with no_results_kept():
            program = without_writes(program)
        write_out(program, stamps)
    except NotStampable as err:
        return traced(model, left_alone | {err.kind})
    return program, stamps


def check(model, stamped):
    """These layers were stamped, and the program computes what the model does, at other sizes too."""
    program, stamps = traced(model)
    assert stamps.layers == [f"layers.{n}" for n in stamped]
    program.graph.lint()
    for rows, new, past in ((2, 3, 5), (4, 1, 9)):
        given = call(len(model.layers), rows, new, past)
        leaves = pytree.tree_leaves(given)
        with torch.no_grad():
            got, want = _run(program, leaves), pytree.tree_leaves(model(*given))
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for layer in model.layers:
        assert "forward" not in vars(layer) and type(layer).__name__ in str(layer)


def test_the_number_of_traced_layers_does_not_grow_with_depth():
    check(made(count=9), range(2, 9))


def test_layers_of_two_kinds_that_take_turns():
    class Windowed(Layer):
        def __init__(self, number):
            super().__init__(number)
            self.window = 2 if number % 2 else 3

        def forward(self, x, cache, mask):
            return super().forward(x, cache, torch.cat([mask[..., : self.window] - 1.0, mask[..., self.window :]], -1))

    check(made(Windowed, 6), [3, 4, 5])


class NoWindow(Layer):
    """What is a number in one layer and None in another tells them apart without an arithmetic."""

    def __init__(self, number):
        super().__init__(number)
        self.window = 3 if number % 2 else None

    def forward(self, x, cache, mask):
        return super().forward(x, cache, mask) * (1.0 if self.window is None else 2.0)


def test_a_number_and_none_are_two_kinds():
    check(made(NoWindow, 6), [3, 4, 5])


class HandsItsNumberOn(Layer):
    def filled(self, cache, k, v):
        return write(cache, k, v, number=self.number)


def write(cache, k, v, number):
    assert isinstance(number, int)
    return cache.layers[number].update(k, v)


def test_a_number_may_go_through_the_models_own_functions():
    check(made(HandsItsNumberOn, 3), [2])


class OnlyReads(Layer):
    """The second half of the layers reads what the first wrote."""

    def __init__(self, number):
        super().__init__(number)
        self.source, self.writes = number % 3, number < 3

    def filled(self, cache, k, v):
        if self.writes:
            return cache.update(k, v, self.number)
        return cache.layers[self.source].keys, cache.layers[self.source].values


def test_layers_that_read_the_slots_of_others_by_a_number_of_their_own():
    check(made(OnlyReads, 6), [2, 4, 5])


class ByNumber(Layer):
    def forward(self, x, cache, mask):
        return super().forward(x, cache, mask) * (1.0 + self.number)


class ByTable(Layer):
    def forward(self, x, cache, mask):
        return super().forward(x, cache, mask) * [1.0, 2.0, 3.0, 5.0][self.number]


class ByParity(Layer):
    def forward(self, x, cache, mask):
        return super().forward(x, cache, mask) * (3.0 if self.number % 2 else 1.0)


class ByName(Layer):
    def forward(self, x, cache, mask):
        return super().forward(x, cache, mask) * {"layer 2": 2.0}.get(f"layer {self.number}", 1.0)


class ReadsTheFirst(Layer):
    def filled(self, cache, k, v):
        k, v = super().filled(cache, k, v)
        return k, v + cache.layers[0].values.mean()


class ReadsTheOneBefore(Layer):
    def filled(self, cache, k, v):
        k, v = super().filled(cache, k, v)
        return k, v + cache.layers[max(self.number - 1, 0)].values.mean()


class WalksTheCache(Layer):
    def filled(self, cache, k, v):
        k, v = super().filled(cache, k, v)
        return k, v + sum(layer.values.mean() for layer in cache.layers)


class AsksForTheLength(Layer):
    def forward(self, x, cache, mask):
        return super().forward(x, cache, mask) * (1.0 + cache.get_seq_length() / 100)


class WritesIntoItsSlot(Layer):
    def filled(self, cache, k, v):
        cache.layers[self.number].values.mul_(0.5)
        return super().filled(cache, k, v)


class KeepsANote(Layer):
    def filled(self, cache, k, v):
        cache.layers[self.number].seen = getattr(cache.layers[self.number], "seen", 0) + 1
        return super().filled(cache, k, v)


class WalksBackwards(Layer):
    def filled(self, cache, k, v):
        k, v = super().filled(cache, k, v)
        return k, v + next(layer.values.mean() for layer in reversed(cache.layers))


class WalksACopy(Layer):
    def filled(self, cache, k, v):
        k, v = super().filled(cache, k, v)
        return k, v + cache.layers.copy()[0].values.mean()


class CountsInTheCache(Layer):
    def forward(self, x, cache, mask):
        cache.depth = getattr(cache, "depth", 0) + 1
        return super().forward(x, cache, mask) * cache.depth


class ListsInTheCache(Layer):
    """What is in the list is no number of the graph: no node of it is read where the next layer is."""

    def forward(self, x, cache, mask):
        cache.seen = getattr(cache, "seen", [])
        cache.seen.append(self.o.bias)
        return super().forward(x, cache, mask) + cache.seen[0]


MORE = [
    ByNumber, ByTable, ByParity, ByName, ReadsTheFirst, ReadsTheOneBefore, WalksTheCache, WalksBackwards, WalksACopy,
    AsksForTheLength, WritesIntoItsSlot, KeepsANote, CountsInTheCache, ListsInTheCache,
]  # fmt: skip


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", MORE)
def test_a_layer_that_does_more_than_fill_its_own_slot_is_not_stamped(kind):
    """A look at one trace: the layer that it refuses by name, or one of which it stamps none."""
    model = made(kind, 3)  # the third layer is the first that might be stamped
    stamps = Stamps(model, carrier=CarriedCache())
    try:
        write_out(exported(model, stamps), stamps)
    except NotStampable as err:
        assert err.kind is kind
    else:
        assert len(stamps.kinds) > 1 and stamps.layers == []


@pytest.mark.parametrize("kind", [ByNumber, WritesIntoItsSlot])
def test_a_layer_that_is_not_stamped_is_traced_each_time(kind):
    check(made(kind, 3), [])


class ToldByItsDecoder(Layer):
    def forward(self, x, cache, mask):
        return super().forward(x, cache, mask) * cache.scale


class Telling(Decoder):
    def forward(self, x, mask, cache):
        for number, layer in enumerate(self.layers):
            cache.scale = 3.0 if number in (2, 4) else 1.0
            x = layer(x, cache=cache, mask=mask)
        return x, [(layer.keys, layer.values) for layer in cache.layers]


def test_what_the_model_tells_a_layer_by_an_attribute_of_its_cache_tells_layers_apart():
    check(made(ToldByItsDecoder, 6, Telling), [3, 4, 5])


CURRENT = types.SimpleNamespace(window=None)


class WindowOfTheMoment(Layer):
    """The window is longer than any call of this test: no number tells that the wrong one was traced."""

    def forward(self, x, cache, mask):
        if CURRENT.window is not None:
            past = torch.arange(mask.shape[-1]).flip(0) >= CURRENT.window
            mask = mask.masked_fill(past, -1e9)
        return super().forward(x, cache, mask)


class SettingWindows(Decoder):
    def forward(self, x, mask, cache):
        for number, layer in enumerate(self.layers):
            CURRENT.window = 50 if number in (2, 4) else None
            x = layer(x, cache=cache, mask=mask)
        return x, [(layer.keys, layer.values) for layer in cache.layers]


def test_what_the_model_tells_a_layer_by_a_global_tells_layers_apart():
    check(made(WindowOfTheMoment, 6, SettingWindows), [3, 4, 5])


@pytest.mark.parametrize("what", ["hook", "eps", pytest.param("dtype", marks=pytest.mark.nightly)])
def test_a_layer_that_only_looks_alike_is_its_own_kind(what):
    model = made(count=5)
    odd = model.layers[3]
    if what == "hook":
        odd.norm.register_forward_hook(lambda module, args, out: out * 2)
    elif what == "eps":
        odd.norm.eps = 0.1
    else:
        odd.o = nn.Linear(H, H, bias=False)
    check(model, [2, 4])
