"""Conditions of sizes that others fix say the same without them, for every call."""

import itertools

import pytest
import torch
from torch import nn

import moeopt
from moeopt.bundle.settled_sizes import at_least_one, settled
from moeopt.bundle.shape_guards import holds, text_of
from moeopt.cli.about import bundle_facts
from moeopt.errors import UsageError

A, B, C = (["size", leaf, 0] for leaf in range(3))
ONE = ["==", A, 1]
SIXTEEN = ["*", 16, B]
BY_ROWS = ["*", ["*", 8, B], A]
CASES = {
    "a remainder": ([ONE, ["==", ["%", SIXTEEN, BY_ROWS], 0]], "a == 1, b >= 1"),
    "a quotient": ([ONE, ["==", SIXTEEN, ["*", BY_ROWS, ["//", 2, A]]]], "a == 1"),
    "by rows": ([ONE, ["==", ["%", B, A], 0], ["==", B, ["//", B, A]]], "a == 1"),
    "one of two": ([ONE, ["or", ["==", SIXTEEN, BY_ROWS], ["==", ["%", SIXTEEN, BY_ROWS], 0]]], "a == 1, b >= 1"),
    "nothing is left out": ([["==", A, 2], ["or", ["==", A, 2], ["==", ["%", C, B], 1]]], "a == 2, b >= 1"),
    "the condition comes first": ([["<=", ["+", B, ["neg", A]], 4], ONE], "(b + -1) <= 4, a == 1"),
    "one fixes the next": ([ONE, ["==", B, ["+", A, 2]], ["==", C, ["*", A, B]]], "a == 1, b == 3, c == 3"),
    "told twice": ([ONE, ["==", A, 1], ["==", A, 1]], "a == 1"),
    "sizes that are free": ([ONE, ["==", B, C], ["==", ["%", B, 2], 0]], "a == 1, b == c, (b % 2) == 0"),
    "what is left of it": ([ONE, ["<=", ["*", A, B], ["*", A, C]]], "a == 1, b <= c"),
    "a divisor that is a sum": ([ONE, ["or", ["==", A, 1], ["==", ["//", C, ["-", B, 2]], 0]]], None),
    "a root": ([ONE, ["or", ["==", A, 1], ["<", ["sqrt", ["-", B, 2]], 9]]], None),
    "no call": ([ONE, ["==", A, 2]], "a == 1, a == 2"),
    "larger where there is one": ([ONE, [">", SIXTEEN, ["*", B, A]], ["==", ["%", B, B], 0]], None),
    "a sum of products": ([ONE, ["!=", ["-", ["+", ["*", A, B], C], B], C]], None),
}


@pytest.mark.parametrize("name", CASES)
def test_it_says_the_same_of_every_call_in_fewer_words(name):
    conditions, told = CASES[name]
    found = settled(conditions)
    for sizes in itertools.product(range(5), repeat=3):
        shapes = [(size,) for size in sizes].__getitem__
        assert holds(found, shapes) == holds(conditions, shapes), sizes
    if told is not None:
        assert ", ".join(text_of(c, lambda leaf: "abc"[leaf]) for c in found).replace(".shape[0]", "") == told


def test_a_size_that_is_there_at_all():
    assert at_least_one([">=", A, 1])
    assert not any(map(at_least_one, ([">=", A, 2], [">=", ["*", A, B], 1], ["<=", A, 1], ["==", A, 1], [">=", 2, A])))


class OneRow(nn.Module):
    """One row only, and parts of it that are as many as there are rows."""

    def forward(self, x):
        if x.shape[0] != 1:
            return x
        return torch.cat([x, x]).view(-1, x.shape[1], 8 * x.shape[0])


def test_what_a_trace_of_one_row_holds_for_is_said_once(tmp_path):
    model, x = OneRow(), torch.randn(1, 5, 8)
    moeopt.optimize(model, x, verify="off").save(tmp_path / "b")
    assert bundle_facts(tmp_path / "b")["holds where"] == [
        "x.shape[0] == 1",
        "x.shape[1] >= 1",  # a remainder by as much was asked for
        "x.shape[2] == 8",
    ]
    loaded, longer = moeopt.load(tmp_path / "b"), torch.randn(1, 9, 8)
    assert torch.equal(loaded(longer), model(longer))
    with pytest.raises(UsageError, match=r"holds for calls where x.shape\[0\] == 1"):
        loaded(torch.randn(2, 5, 8))
