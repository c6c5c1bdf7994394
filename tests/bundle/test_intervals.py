"""Conditions on one product of sizes are read as the interval that they hold on, and only where they are one."""

import pytest

from moeopt.bundle.intervals import REACH, simplest, simplified
from moeopt.bundle.shape_guards import holds, text_of

A, B = ["size", 0, 0], ["size", 1, 1]
AB = ["*", A, B]
HALF = ["floor", ["/", ["*", 2.0, ["float", ["*", B, A]]], 4.0]]
CAPACITY = ["==", ["max", 2, ["+", HALF, ["%", HALF, 2]]], 10]


def example(a, b=1):
    return lambda leaf: [(a,), (0, b)][leaf]


@pytest.mark.parametrize(
    ("condition", "shape", "want"),
    [
        (CAPACITY, (2, 9), "x.shape[0] * y.shape[1] is 18 to 21"),
        (["==", ["//", A, 4], 2], (9,), "x.shape[0] is 8 to 11"),
        (["==", ["floor", ["*", 1.5, A]], 7], (5,), "x.shape[0] == 5"),
        (["==", ["max", 2, ["//", A, 4]], 2], (3,), "x.shape[0] <= 11"),
        (["<", 4, ["*", 8, A]], (3,), "4 < (8 * x.shape[0])"),
        (["==", ["%", A, 4], 0], (8,), "(x.shape[0] % 4) == 0"),
        (["==", ["max", A, B], 9], (9, 3), "max(x.shape[0], y.shape[1]) == 9"),
        ([">", A, 1], (3,), "x.shape[0] > 1"),
        (["==", A, B], (3, 3), "x.shape[0] == y.shape[1]"),
        (["==", ["//", A, 4], 2], (3,), "(x.shape[0] // 4) == 2"),
    ],
    ids=["capacity", "both ends", "one size", "upper end", "no upper end", "not one interval", "two quantities",
         "plain", "two sizes", "not met"],
)  # fmt: skip
def test_a_condition_as_an_interval(condition, shape, want):
    assert text_of(simplest(condition, example(*shape)), lambda leaf: "xy"[leaf]) == want


def test_an_interval_refuses_no_size_near_it_that_the_condition_takes():
    simple = simplest(CAPACITY, example(2, 9))
    for tokens in range(1, 200):
        shapes = [(tokens,), (0, 1)].__getitem__
        assert holds([simple], shapes) == holds([CAPACITY], shapes)


def test_a_condition_that_holds_far_away_keeps_its_form():
    far = ["==", ["//", A, REACH * 4], 0]
    assert simplest(far, example(3)) == far


def test_conditions_on_one_quantity_are_one_interval():
    both = [CAPACITY, [">", HALF, 2], ["<", 4, ["*", 8, AB]], [">", B, 1]]
    told = [text_of(c, lambda leaf: "xy"[leaf]) for c in simplified(both, example(2, 9))]
    assert told == ["x.shape[0] * y.shape[1] is 18 to 21", "y.shape[1] > 1"]
