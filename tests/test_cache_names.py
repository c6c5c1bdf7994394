"""A cache has one name in a model's own code and another in a newer library's."""

import dataclasses

import pytest
from torch import nn

from moeopt.cache_names import cache_parameter, field_named, under_one_name
from moeopt.errors import UsageError
from moeopt.find.example_inputs import without_cache


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None, use_cache=None): ...


class New(nn.Module):
    def forward(self, input_ids, cache=None, use_cache=None): ...


def test_the_parameter_that_takes_a_cache():
    assert [cache_parameter(model) for model in (Old(), New(), nn.Linear(2, 2))] == ["past_key_values", "cache", ""]


def test_the_field_that_has_one():
    old = dataclasses.make_dataclass("Old", ["logits", "past_key_values"])
    new = dataclasses.make_dataclass("New", ["logits", "cache"])
    assert [field_named(kind) for kind in (old, new, dict)] == ["past_key_values", "cache", "past_key_values"]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_an_argument_under_either_name(name):
    held = object()
    assert under_one_name({"input_ids": 1, name: held}) == {"input_ids": 1, "past_key_values": held}
    assert under_one_name({"input_ids": 1, "cache": None, "past_key_values": held})["past_key_values"] is held
    assert without_cache(New(), ((1,), {name: None}))[1] == {name: None}


def test_two_caches_are_one_too_many():
    with pytest.raises(UsageError, match="^cache and past_key_values are two names of one argument; give it once$"):
        under_one_name({"cache": object(), "past_key_values": object()})
