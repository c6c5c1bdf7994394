"""Which way the tests of a function went, by what stands in its source."""

import ast
import gc
import sys
import types
import weakref
from pathlib import Path

import pytest

from moeopt.control_flow.branches_taken import BranchesTaken
from moeopt.control_flow.untaken_branches import DispatchFacts, untaken

TEXT = Path(__file__).read_text()
needs_columns = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps no columns of instructions")


def above(x):
    return x > 2


def code(x):
    y = 0
    if x < 2:
        y += 1
    if x < 100 and x != 7:
        y += 2
    if 0 < x < 5:
        y += 4
    if above(x):
        y += 8
    z = [i for i in range(3) if i < x]
    w = 1 if x == 3 else 2
    while y > 1000:
        y -= 1
    if not z or w > 9:
        y += 16
    if x in (1, 2, 3) or x is None:
        y += 32
    return y


WENT = {
    "x < 2": {True, False}, "x < 100": {True}, "x != 7": {True}, "0 < x < 5": {True}, "above(x)": {True, False},
    "i < x": {True, False}, "x == 3": {True, False}, "y > 1000": {False}, "z": {True}, "w > 9": {False},
    "x in (1, 2, 3)": {True}, "x > 2": {True, False},
}  # fmt: skip


def went(taken):
    """By the text of each test its answers."""
    places = {
        (n.lineno, n.col_offset, n.end_lineno, n.end_col_offset): ast.unparse(n)
        for n in ast.walk(ast.parse(TEXT))
        if isinstance(n, ast.expr)
    }
    return {places[at]: answers for (_, at), answers in taken.answers.items()}


def anew(function):
    """The function as it is before its first call: what an interpreter changes in code that is traced is not there."""
    return types.FunctionType(function.__code__.replace(), function.__globals__)


@needs_columns
def test_every_call_is_watched_from_the_first_on(monkeypatch):
    monkeypatch.setitem(globals(), "above", anew(above))
    taken, run = BranchesTaken(), anew(code)
    for x in (1, 3):
        assert taken.watching(run, x) == code(x)
    assert went(taken) == WENT


@needs_columns
def test_an_error_ends_the_watching_and_who_traced_before_goes_on():
    def tracer(frame, event, arg):
        return None

    def fails(x):
        if x > 0:
            raise ValueError(x)

    taken, before = BranchesTaken(), sys.gettrace()
    sys.settrace(tracer)
    try:
        with pytest.raises(ValueError, match="1"):
            taken.watching(fails, 1)
        now = sys.gettrace()
    finally:
        sys.settrace(before)
    assert now is tracer and went(taken) == {"x > 0": {True}}


_TOOL = """
def asks(phase):
    return 1 if phase == "never" else 2

def called(phase, info):
    if phase == "never":
        pass
    asks(phase)

class Counts:
    def called(self, phase, info):
        return asks(phase)

class Held:
    def __del__(self):
        if self is None:
            pass
        asks("freed")

class Closed:
    def close(self):
        if self is None:
            pass
        asks("freed")

    __del__ = close

class Notes:
    def gone(self, reference):
        if self is None:
            pass
        asks("freed")

def gone(reference, more=None):
    if more is not None:
        pass
    asks("freed")
"""


class Thing:
    """What something weakly refers to."""


@pytest.mark.parametrize(
    "freed",
    [
        "by the collector", "by the collector, a method", "at once", "finalized", "closed", "a weak reference",
        "a weak reference, a method",
    ],
)  # fmt: skip
def test_what_python_calls_when_memory_is_freed_is_no_code_of_a_model(freed):
    tool = {}
    exec(compile(_TOOL, "/x/site-packages/tool/memory.py", "exec"), tool)
    taken = BranchesTaken()
    taken.watching(tool["asks"], "called")
    assert taken.answers, "code of a package may be a model's"
    taken = BranchesTaken()
    if freed == "at once":
        taken.watching(lambda: tool["Held"]() and None)
    elif freed == "closed":
        taken.watching(lambda: tool["Closed"]() and None)
    elif freed.startswith("a weak reference"):
        held = [Thing()]
        reference = weakref.ref(held[0], tool["Notes"]().gone if "method" in freed else tool["gone"])
        taken.watching(held.clear)
        assert reference() is None
    elif freed == "finalized":
        held = [Thing()]
        weakref.finalize(held[0], tool["asks"], "freed")
        taken.watching(held.clear)
    else:
        called = tool["Counts"]().called if "method" in freed else tool["called"]
        gc.callbacks.append(called)
        try:
            taken.watching(lambda: gc.collect())
        finally:
            gc.callbacks.remove(called)
    assert not [place for place in taken.answers if place[0].co_filename.startswith("/x/")]


def test_a_call_that_the_model_does_not_take_shows_nothing():
    taken = BranchesTaken()
    taken.watching(code, 1)

    def refused(watch):
        raise ValueError("Expected more than 1 value per channel when training")

    assert taken.answers and list(untaken(taken, [[refused, refused]], DispatchFacts(4, False, None))) == []
