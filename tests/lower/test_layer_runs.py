"""Layers that differ in what an example call does not show: none of them is stamped for another."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeopt.lower.functional import export_functional
from moeopt.lower.layer_runs import layer_runs
from moeopt.lower.stamps import Stamps
from tests.helpers import assert_same

H = 8
BOUNDS = [1e4, 1e4, 1e4, 2.0]
"""Of each layer's inner values: the example reaches none, other inputs reach the last layer's."""
DEEP = types.SimpleNamespace(a=types.SimpleNamespace(b=types.SimpleNamespace(c=[{"bound": 1.0}])))


def variable_of_a_closure():
    bound = 1.0

    def get():
        return bound

    def put(value):
        nonlocal bound
        bound = value

    return get, put


get, put = variable_of_a_closure()


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.own_bound = number, BOUNDS[number]
        self.norm = nn.LayerNorm(H)
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H)

    def bound(self):
        return self.own_bound

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)).clamp(max=self.bound()))


class ByVars(Layer):
    def bound(self):
        return vars(self)["own_bound"]


class ByDict(Layer):
    def bound(self):
        return self.__dict__.get("own_bound")


class ByCopyOfTheTable(Layer):
    def bound(self):
        return {**self.__dict__}["own_bound"]


class ByTheTablePastTheClass(Layer):
    def bound(self):
        return vars(nn.Module)["__dict__"].__get__(self)["own_bound"]


class ByADeepObject(Layer):
    def bound(self):
        return DEEP.a.b.c[0]["bound"]


class ByAClosure(Layer):
    def bound(self):
        return get()


class ByAnIterator(Layer):
    def bound(self):
        return next(ByAnIterator.bounds)


class ByASharedObject(Layer):
    settings = types.SimpleNamespace(bound=1.0)

    def __init__(self, number):
        super().__init__(number)
        self.config = self.settings

    def bound(self):
        return self.config.bound


class OneOfTwoMasks(Layer):
    """The masks are equal for short inputs; which one a layer takes is seen in what its ops are given alone."""

    def forward(self, x, masks):
        wide = vars(nn.Module)["__dict__"].__get__(self)["own_bound"] > 100
        return x + self.down(F.silu(self.up(x))) * masks[0 if wide else 1]


class Tower(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.layers = kind, nn.ModuleList(kind(i) for i in range(4))
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, x):
        ByAnIterator.bounds = iter(BOUNDS)
        far = torch.arange(x.shape[1]).view(-1, 1) > 4
        masks = torch.zeros_like(x) + far, torch.zeros_like(x)
        for layer, bound in zip(self.layers, BOUNDS, strict=True):
            DEEP.a.b.c[0]["bound"] = ByASharedObject.settings.bound = bound
            put(bound)
            x = layer(x, masks) if self.kind is OneOfTwoMasks else layer(x)
        return x


KINDS = [
    ByVars, ByDict, ByCopyOfTheTable, ByTheTablePastTheClass, ByADeepObject, ByAClosure, ByAnIterator,
    ByASharedObject, OneOfTwoMasks,
]  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_layer_is_not_stamped_for_one_that_differs_in_what_the_example_does_not_show(kind):
    model, x = Tower(kind).eval(), torch.randn(2, 3, H)
    program = export_functional(model, (x,), {}).module()
    for other in (torch.randn(2, 3, H), torch.randn(2, 9, H), torch.randn(2, 3, H) * 100):
        assert_same(program(other), model(other), exact=True)


class BySize(Layer):
    """The bound is compared with a size: on the example, all layers call the same ops."""

    def forward(self, x):
        return super().forward(x) * (0.5 if x.shape[1] > self.limit() else 1.0)

    def limit(self):
        return vars(self)["own_bound"] * 4


class BySizeAndClosure(BySize):
    def limit(self):
        return get() * 4


@pytest.mark.parametrize("kind", [BySize, BySizeAndClosure])
def test_a_condition_on_a_size_that_one_layer_has_is_in_the_graph(kind):
    model, x = Tower(kind).eval(), torch.randn(2, 3, H)
    program = export_functional(model, (x,), {}).module()
    assert_same(program(x), model(x), exact=True)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.randn(2, 9, H))


def test_alike_layers_write_the_same_words_and_a_layer_that_runs_otherwise_does_not():
    model, x = Tower(Layer).eval(), torch.randn(2, 3, H)
    model.layers[2].own_bound = 2.5
    layers = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    runs = layer_runs(layers, None, lambda: model(x))
    assert [path for path, _ in runs] == list(layers)
    same = [runs[0][1] == words for _, words in runs]
    assert same == [True, True, False, False]
    assert all("forward" not in layer.__dict__ for layer in model.layers)


def test_a_tensor_from_elsewhere_is_told_by_its_bits():
    values = itertools.chain([1.0, 1.0], itertools.repeat(2.0))

    class Adds(Layer):
        def forward(self, x):
            return super().forward(x) + torch.tensor(next(values))

    model, x = Tower(Adds).eval(), torch.randn(2, 3, H)
    runs = layer_runs({f"layers.{i}": layer for i, layer in enumerate(model.layers)}, None, lambda: model(x))
    assert [runs[0][1] == words for _, words in runs] == [True, True, False, False]


def test_an_alias_of_a_weight_is_told_by_its_place():
    class Aliases(Layer):
        def forward(self, x):
            of = self.down.weight.data if self.number < 3 else self.down.weight.data[:, 1:]
            return x + F.silu(self.up(x))[..., : of.shape[1]] @ of.t()

    model, x = Tower(Aliases).eval(), torch.randn(2, 3, H)
    runs = layer_runs({f"layers.{i}": layer for i, layer in enumerate(model.layers)}, None, lambda: model(x))
    assert [runs[0][1] == words for _, words in runs] == [True, True, True, False]


def test_a_run_that_calls_other_layers_than_the_trace_proves_nothing():
    model, x = Tower(Layer).eval(), torch.randn(2, 3, H)
    for layer in model.layers:
        layer.own_bound = 1.0
    stamps = Stamps(model)
    with stamps.during(), torch.no_grad():
        torch.export.export(model, (x,), strict=False)
    assert stamps.layers == ["layers.1", "layers.2"] and stamps.unlike(lambda: model(x)) == frozenset()
    assert stamps.unlike(lambda: model.layers[0](x)) == {Layer}
    assert stamps.unlike(lambda: model(x, "an argument too many")) == {Layer}
    assert all("forward" not in layer.__dict__ for layer in model.layers)
