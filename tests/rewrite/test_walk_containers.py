"""Attributes of functions, and numbers in memory that no container of Python's holds: a change is told."""

import array
import ctypes

import pytest
import torch

from moeopt.errors import StaleModelWarning
from tests.toy_moe import Block, build, close, optimized, seeded

X = seeded(2, 8, 16)


class Pair(ctypes.Structure):
    _fields_ = (("one", ctypes.c_double), ("two", ctypes.c_double))


def factor():
    return factor.scale


factor.scale = 1.0
NUMBERS = {
    "array": (lambda: array.array("d", [1.0, 2.0]), lambda held: held[0], lambda held: held.__setitem__(0, 5.0)),
    "longer array": (lambda: array.array("d", [1.0]), len, lambda held: held.append(2.0)),
    "number of ctypes": (lambda: ctypes.c_double(1.0), lambda held: held.value, lambda h: setattr(h, "value", 5.0)),
    "array of ctypes": (lambda: (ctypes.c_int * 2)(1, 2), lambda h: h[0], lambda h: h.__setitem__(0, 5)),
    "structure of ctypes": (lambda: Pair(1.0, 2.0), lambda h: h.one, lambda h: setattr(h, "one", 5.0)),
}


class Scaled(Block):
    def __init__(self, make, read):
        super().__init__()
        self.held, self.read = make(), read

    def forward(self, x):
        return super().forward(x) * self.read(self.held)


def told(fast, model, change, text):
    before = fast(X)
    change()
    with pytest.warns(StaleModelWarning, match=text):
        got = fast(X)
    close(got, model(X))
    assert not torch.equal(got, before)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_memory_are_compared(name):
    make, read, change = NUMBERS[name]
    fast = optimized(build(Scaled, make=make, read=read))
    told(fast, fast.model.forward.own(), lambda: change(fast.model.held), "held, which its code reads")


def test_attributes_of_a_function_are_read_as_an_objects_are(monkeypatch):
    model = build(Scaled, make=dict, read=lambda held: factor())
    told(
        optimized(model),
        model,
        lambda: monkeypatch.setattr(factor, "scale", 3.0),
        r"factor.scale, which its code reads, is 3.0 and was 1.0",
    )
