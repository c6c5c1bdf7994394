"""Optimization profiles: what follows from the example, what the user may give, and each refusal."""

import pytest

from moeopt.backends.tensorrt.profiles import default_sizes, fits, profiles_for
from moeopt.errors import UsageError

ENDS = {"x": ["b", "s", 16], "mask": ["b", "s + p"], "past": ["p", 4], "scale": [3]}
EXAMPLE = {"x": (2, 8, 16), "mask": (2, 13), "past": (5, 4), "scale": (3,)}
SIZES = default_sizes(ENDS, EXAMPLE, {"b": [1, 6], "s": [2, None], "p": [0, None]})


def test_defaults_come_from_the_example():
    assert SIZES == {"b": (1, 2, 6), "s": (2, 8, 32), "p": (1, 5, 20)}
    (one,) = profiles_for(ENDS, SIZES)
    assert one == {
        "x": ((1, 2, 16), (2, 8, 16), (6, 32, 16)),
        "mask": ((1, 3), (2, 13), (6, 52)),
        "past": ((1, 4), (5, 4), (20, 4)),
    }


def test_the_longest_size_reaches_the_token_counts():
    assert default_sizes(ENDS, EXAMPLE, {}, (1, 512))["s"] == (1, 8, 512)
    assert default_sizes(ENDS, EXAMPLE, {}, (1, 4))["s"] == (1, 8, 32)


def test_a_graph_of_fixed_sizes_needs_none():
    assert profiles_for({"x": [2, 3]}, {}) == []


def test_a_given_input_decides_for_the_others():
    given = {"x": ((1, 1, 16), (1, 4, 16), (1, 64, 16))}
    (one,) = profiles_for(ENDS, SIZES, given)
    assert one["x"] == given["x"] and one["mask"] == ((1, 2), (1, 9), (1, 84))
    two = profiles_for(ENDS, SIZES, [given, {"past": ((0, 4), (0, 4), (0, 4))}])
    assert len(two) == 2 and two[1]["mask"] == ((1, 2), (2, 8), (6, 32))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"y": ()}, "the model has no input 'y'; it has x, mask, past, scale"),
        ({"pas": ()}, "did you mean 'past'?"),
        ({"x": ((1, 1, 16), (1, 4, 16))}, "it must be three shapes of 3 sizes: the least, the best and the largest"),
        ({"x": 3}, "it must be three shapes of 3 sizes"),
        ({"x": ((1, 4, 16), (1, 2, 16), (1, 8, 16))}, "the sizes 4, 2, 8 at axis 1: they must not fall"),
        ({"x": ((1, 1, 8), (1, 1, 16), (1, 1, 16))}, "at axis 2: the model fixes it to 16"),
        ("x", "it must map an input's name to its least, best and largest shape"),
        (
            {"x": ((1, 1, 16), (1, 1, 16), (1, 1, 16)), "mask": ((2, 1), (2, 1), (2, 1))},
            "mask has (2, 2, 2) at axis 0, and x has (1, 1, 1) for the same size",
        ),
    ],
)
def test_refusals(given, words):
    with pytest.raises(UsageError) as err:
        profiles_for(ENDS, SIZES, given)
    assert words in str(err.value)


@pytest.mark.parametrize("dim", [None, "s ** 2", "floor(s)", "s +"])
def test_a_size_that_nothing_determines(dim):
    ends = {"x": ["s"], "y": [dim]}
    with pytest.raises(UsageError, match="axis 0 of the input y is .*, which the example does not determine: give pro"):
        profiles_for(ends, {"s": (1, 2, 3)})
    given = {"y": ((1,), (2,), (3,))}
    assert profiles_for(ends, {"s": (1, 2, 3)}, given) == [{"x": given["y"], **given}]


def test_what_is_outside():
    (one,) = profiles_for(ENDS, SIZES)
    assert fits(one, EXAMPLE) == ""
    assert fits(one, {**EXAMPLE, "x": (2, 33, 16)}) == "x has size 33 at axis 1, and the engine was built for 2 to 32"
