"""Which questions of Python's about tensors are assertions."""

import contextlib
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from moeopt.capture.bool_reads import BoolReads, _calls_of, is_assertion
from moeopt.capture.source_line import user_line
from moeopt.patches.tracing import _length


def asserts(x):
    assert x.isfinite().all()
    return x


def raises(x):
    if torch.isnan(x).any():
        raise ValueError("NaN")
    return x


def raises_elsewhere(x):
    if (x > 100).any():
        refuse()
    return x


def refuse():
    raise ValueError("too large")


def fails(x):
    big = x > 100
    if big.any():
        return x / x[big].amax()  # of no rows: an error of the operation, and none where there are some
    return x


def branches(x):
    return x * 2 if (x > 0).any() else x


def in_a_library(x):
    return torch.distributions.Normal(x.new_zeros(()), x.new_ones(()), validate_args=True).cdf(x)


def goes_on(x):
    while (x > 100).any():
        x = x / 2
    return x


@pytest.mark.parametrize(
    ("code", "is_one"),
    [(asserts, True), (raises, True), (in_a_library, True), (raises_elsewhere, False), (fails, False),
     (branches, False), (goes_on, False)],
)  # fmt: skip
def test_an_assertion_raises_by_a_statement_of_the_function_that_asks(code, is_one):
    x, lines = torch.tensor([0.5, -1.0]), []

    def note(place, answer):
        lines.append(place[0])
        return answer

    with BoolReads(note):
        code(x)
    assert lines
    assert any(is_assertion(lambda mode: under(mode, code, x), line) for line in set(lines)) is is_one


def under(mode, code, x):
    with mode:
        return code(x)


def test_modes_around_it_do_not_hide_who_asks():
    from moeopt.capture.isolated_run import WatchWrites

    lines = []
    with BoolReads(lambda place, answer: lines.append(place[0]) or answer):
        asserts(torch.ones(2))

    def run(mode):
        with mode, WatchWrites(lambda tensor: None):
            asserts(torch.ones(2))

    assert is_assertion(run, lines[0])
    assert user_line().rpartition(":")[0] == lines[0].rpartition(":")[0]


class Asked(TorchFunctionMode):
    """Notes where a tensor's length is asked for; what it notes by is no code of the user's."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__len__:
            frame = sys._getframe(1)
            while frame.f_code is not asks.__code__:
                frame = frame.f_back
            self.places.add(_calls_of(frame.f_code).get(frame.f_lasti, frame.f_lasti))
        return func(*args, **(kwargs or {}))


def asks(length, value):
    return length(value) > 0


def test_a_call_stands_at_one_place_whether_what_it_calls_is_of_c_or_of_python():
    """While a trace is made, ``len`` is a function of Python's in a model's code; where values are read, it is C's."""
    with Asked() as asked:
        for _ in range(64):  # a call that has run often is done by another instruction
            assert asks(len, torch.ones(2)) and asks(_length, torch.ones(2))
    assert len(asked.places) == 1


def test_the_users_line_is_not_that_of_a_decorator_between():
    @contextlib.contextmanager
    def around():
        yield

    assert around()(user_line)().rpartition(":")[0] == __file__
