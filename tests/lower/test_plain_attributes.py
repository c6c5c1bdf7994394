"""A traced layer's number: the cache may ask which it is; any other use is noted, and goes as it goes for an int."""

import copy
import operator

import pytest

from moeopt.lower.plain_attributes import LayerNumber

AT = ("attention", "number")


def number(value=3):
    used = []
    return LayerNumber(value, AT, used.append), used


@pytest.mark.parametrize(
    "use",
    [
        lambda n: n + 1, lambda n: 1 + n, lambda n: n % 2, lambda n: 2**n, lambda n: -n, lambda n: n == 3,
        lambda n: n == 3, lambda n: n != 3, lambda n: n < 4, lambda n: n <= 4, lambda n: bool(n), lambda n: int(n),
        lambda n: float(n), lambda n: str(n), lambda n: repr(n), lambda n: f"layer {n}", lambda n: hash(n),
        lambda n: [0, 1, 2, 3, 4][n], lambda n: [0, 1, 2, 3, 4][:n], lambda n: {3: "x"}[n], lambda n: n in (1, 3),
        lambda n: n in {1, 3}, lambda n: list(range(n)), lambda n: n.bit_length(), lambda n: n.real, lambda n: [7] * n,
        lambda n: n + 1.0, lambda n: 1.0 + n, lambda n: 6.0 / n, lambda n: operator.eq(3.0, n), lambda n: n == 3.0,
        lambda n: operator.lt(2.5, n), lambda n: n >> 1, lambda n: 9 >> n, lambda n: 1.5**n, lambda n: 7.5 % n,
        lambda n: n & 1, lambda n: divmod(n, 2), lambda n: round(n), lambda n: copy.deepcopy(n) + 0,
    ],
)  # fmt: skip
def test_every_use_is_noted_and_is_the_ints_own(use):
    n, used = number()
    assert use(n) == use(3)
    assert used and set(used) == {AT}


def test_what_every_layers_number_answers_alike_is_not_noted():
    n, used = number()
    assert isinstance(n, int) and n is not None and n.held == 3
    assert used == []
