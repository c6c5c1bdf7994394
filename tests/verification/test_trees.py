"""Outputs of any form are opened, described and compared."""

import collections
import copy
import dataclasses
import pickle

import torch
import torch.utils._pytree as pytree

from moeopt.verification.fields import Fields
from moeopt.verification.trees import describe, equal_leaves, flatten, same_calls


@dataclasses.dataclass
class Out:
    y: torch.Tensor
    loss: float


class Cache:
    def __init__(self, key):
        self.keys, self.me = [key], self


def test_dataclasses_and_objects_are_opened():
    x = torch.ones(2)
    leaves, form = flatten((Out(x, 0.5), {"cache": Cache(x)}))
    assert [leaf is x for leaf in leaves].count(True) == 2 and leaves[2] == 0.5
    assert form == flatten((Out(x + 1, 0.7), {"cache": Cache(x)}))[1]
    assert form != flatten((Out(x, 0.5), {"cache": None}))[1]


def test_describe():
    assert (
        describe((torch.ones(2, 3, dtype=torch.half), [1], {"a": None}))
        == "tuple(float16(2, 3), list(int), {a: NoneType})"
    )


def test_equal_leaves():
    nan = float("nan")
    assert equal_leaves("a", "a") and equal_leaves(nan, nan) and equal_leaves(object(), object())
    assert not equal_leaves(1, True) and not equal_leaves("a", "b") and not equal_leaves(None, 0)


def test_named_tuples_are_known_by_name_and_fields():
    x = torch.ones(2)
    pair, again = (collections.namedtuple("Pair", ["y", "aux"]) for _ in range(2))
    leaves, form = flatten(pair(x, [Out(x, 0.5)]))
    same, form_again = flatten(again(x, [Out(x, 0.5)]))
    assert form == form_again and len(leaves) == len(same) and leaves[0] is same[0] is x
    for other in (collections.namedtuple("Other", ["y", "aux"]), collections.namedtuple("Pair", ["y", "loss"]), tuple):
        value = (x, [Out(x, 0.5)])
        assert flatten(value if other is tuple else other(*value))[1] != form


@dataclasses.dataclass
class Result:
    y: torch.Tensor
    aux: torch.Tensor


torch.export.register_dataclass(Result)


def test_results_of_registered_data_classes_are_known_by_name_and_fields():
    x = torch.ones(2)
    leaves, form = flatten([Result(x, x + 1)])
    same, form_again = flatten([Fields.of("Result", {"y": x, "aux": x + 1})])
    assert form == form_again and len(leaves) == len(same) == 2 and leaves[0] is same[0] is x
    for other in ([Fields.of("Other", {"y": x, "aux": x})], [Fields.of("Result", {"y": x})], [{"y": x, "aux": x}]):
        assert flatten(other)[1] != form
    again = pytree.tree_map(torch.clone, Fields.of("Result", {"y": x, "aux": x}))
    assert list(again) == ["y", "aux"] and torch.equal(again.aux, x) and flatten([again])[1] == form


def test_a_field_may_have_the_name_of_a_method_of_a_dict():
    x = torch.ones(2)
    for made in (lambda f: f, copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))):
        fields = made(Fields.of("Result", {"values": x, "items": x + 1, "keys": x + 2}))
        doubled = pytree.tree_map(lambda t: 2 * t, fields)
        assert torch.equal(doubled.values, 2 * x) and torch.equal(doubled.items, 2 * x + 2)
        assert torch.equal(doubled.keys, 2 * x + 4) and doubled._of == "Result"
        assert len(flatten(fields)[0]) == 3


def test_calls_are_the_same_where_a_model_is_given_the_same():
    x, thing = torch.ones(2), object()
    call = ((x, 1, thing), {"mask": None})
    assert same_calls(call, ((x.clone(), 1, thing), {"mask": None}))
    others = [((x + 1, 1, thing), {}), ((x.double(), 1, thing), {}), ((x, 2, thing), {}), ((x, 1, object()), {})]
    assert not any(same_calls(call, (args, {"mask": None})) for args, _ in others)
    assert not same_calls(call, ((x, 1, thing), {"mask": x})) and not same_calls(call, ((x, 1, thing), {}))
