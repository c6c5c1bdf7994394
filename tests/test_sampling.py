"""Which cases of a sampled test run every day: each n-th, and each value of each parameter."""

import itertools
import types

import pytest

from tests.conftest import pytest_collection_modifyitems

pytestmark = pytest.mark.one_isa  # marks


class Item:
    def __init__(self, names, marks=()):
        self.nodeid, self.marks = f"tests/test_x.py::test_x[{'-'.join(names)}]", {mark.name: mark for mark in marks}
        self.callspec = types.SimpleNamespace(_idlist=list(names))

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, mark):
        self.marks[mark.name] = mark


def daily(cases, each, marks=None):
    items = [Item(names, [pytest.mark.sample(each).mark, *(marks or {}).get(names, ())]) for names in cases]
    pytest_collection_modifyitems(items)
    return ["".join(item.callspec._idlist) for item in items if not item.get_closest_marker("nightly")]


@pytest.mark.parametrize(
    ("axes", "each", "kept"),
    [
        (["abcdefg"], 3, ["a", "d", "g"]),
        (["abc", "xy"], 2, ["ax", "ay", "bx", "cx"]),  # each second is of x only
        (["abc", "xy"], 3, ["ax", "by", "cx"]),  # and c in none of each third
        (["ab", "xyz"], 2, ["ax", "az", "by"]),
    ],
)
def test_each_value_of_each_parameter_is_in_a_case(axes, each, kept):
    assert daily(list(itertools.product(*axes)), each) == kept


def test_a_case_that_is_nightly_by_itself_stays_so():
    cases = list(itertools.product("ab", "xy"))
    assert daily(cases, 2, {("a", "y"): [pytest.mark.nightly.mark]}) == ["ax", "bx", "by"]
