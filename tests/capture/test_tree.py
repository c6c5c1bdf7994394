"""Containers keep their types; only the leaves of the named kind change."""

import dataclasses
from collections import OrderedDict, namedtuple
from types import MappingProxyType

import torch

from moeopt.capture.tree import leaves_of, tree_leaves, tree_map

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Out:
    logits: object
    aux: object = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: Out
    name: str = "n"


class Names(list):
    pass


def plus_one(tree):
    return tree_map(int, lambda i: i + 1, tree)


def test_every_container_keeps_its_type():
    assert plus_one((1, [2, {"a": 3}], Pair(4, "x"))) == (2, [3, {"a": 4}], Pair(5, "x"))
    assert type(plus_one(Pair(1, 2))) is Pair and type(plus_one([1])) is list
    assert plus_one(OrderedDict(b=1, a=2)) == OrderedDict(b=2, a=3)
    assert plus_one(slice(1, None, 2)) == slice(2, None, 3)
    assert plus_one(Names([1, 2])) == [2, 3]
    assert plus_one(Out(1, [2])) == Out(2, [3]) and plus_one(Frozen(Out(1))) == Frozen(Out(2))
    assert plus_one("text") == "text" and plus_one(None) is None and plus_one(Out) is Out


def test_a_named_tuple_whose_class_checks_its_tensors_may_hold_anything():
    """A packed sequence asks its first field for a device, and a trace puts nodes in the place of tensors."""
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.ones(2, 3, 4), torch.tensor([3, 2]), batch_first=True)
    mapped = tree_map(torch.Tensor, lambda t: tuple(t.shape), packed)
    assert type(mapped) is type(packed) and mapped[:2] == ((5, 4), (3,))


def test_the_original_is_not_touched():
    inner = Out([1], {"k": 2})
    tree = OrderedDict(a=Frozen(inner), b=(3,))
    plus_one(tree)
    assert tree == OrderedDict(a=Frozen(Out([1], {"k": 2})), b=(3,)) and tree["a"].inner is inner


def test_the_results_of_max_and_topk_become_tuples():
    best = torch.randn(3, 4).max(-1)
    mapped = tree_map(torch.Tensor, lambda t: t.shape, best)
    assert mapped == ((3,), (3,))


def test_leaves_come_in_a_fixed_order_and_none_is_one():
    tree = {"b": (1, None), "a": [Out(2, slice(3, None)), MappingProxyType({"z": 4})]}
    assert list(tree_leaves(tree)) == [1, None, 2, 3, None, None, 4]
    assert leaves_of(int, tree) == [1, 2, 3, 4] and leaves_of(torch.Tensor, tree) == []


def test_a_model_output_changes_by_key_and_by_attribute():
    class ModelOutput(OrderedDict):  # as transformers has it: a dataclass that is a mapping
        def __setattr__(self, name, value):
            super().__setitem__(name, value)
            super().__setattr__(name, value)

    made = dataclasses.make_dataclass(
        "MoeOutput", [("hidden", object, None), ("ids", object, None)], bases=(ModelOutput,), eq=False
    )
    out = made(hidden=1, ids=(2, 3))
    new = plus_one(out)
    assert type(new) is made and new.hidden == new["hidden"] == 2 and new["ids"] == new.ids == (3, 4)
    assert out.hidden == 1 and list(tree_leaves(new)) == [2, 3, 4]
