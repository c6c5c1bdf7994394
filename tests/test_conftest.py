"""What is for every day and what is for the night, and what a lesser CPU takes: the marks of the suite."""

import types

import pytest

from tests.conftest import pytest_collection_modifyitems


def item(nodeid, *marks):
    held = list(marks)
    return types.SimpleNamespace(
        nodeid=nodeid,
        callspec=types.SimpleNamespace(_idlist=nodeid.partition("[")[2].rstrip("]").split("-")),
        held=held,
        add_marker=held.append,
        get_closest_marker=lambda name: next((mark.mark for mark in held if mark.mark.name == name), None),
    )


def test_of_a_sampled_test_each_nth_case_is_for_every_day_and_no_other_test_loses_one():
    third = pytest.mark.sample(3)
    items = [item(f"a.py::test_a[{n}]", third) for n in range(7)]
    items.insert(1, item("a.py::test_b[0]", pytest.mark.sample(2)))  # as a module's fixtures sort cases among others
    items += [item(f"a.py::test_c[{n}]") for n in range(2)]
    pytest_collection_modifyitems(items)
    left = [one.nodeid.partition("::test_")[2] for one in items if pytest.mark.nightly not in one.held]
    assert left == ["a[0]", "b[0]", "a[3]", "a[6]", "c[0]", "c[1]"]


def test_a_lesser_cpu_takes_each_value_of_each_parameter_once_and_each_case_of_a_list():
    night = pytest.mark.nightly
    items = [item(f"a.py::test_a[{x}-{y}-{z}]") for x in "abc" for y in "de" for z in "fgh"]
    items += [item(f"a.py::test_b[{n}]") for n in range(4)] + [
        item("a.py::test_c[a-d]", night),
        item("a.py::test_c[a-e]"),
    ]
    pytest_collection_modifyitems(items)
    left = [one.nodeid.partition("::test_")[2] for one in items if pytest.mark.one_isa not in one.held]
    assert left[:6] == ["a[a-d-f]", "a[a-d-g]", "a[a-d-h]", "a[a-e-f]", "a[b-d-f]", "a[c-d-f]"]
    assert left[6:] == ["b[0]", "b[1]", "b[2]", "b[3]", "c[a-d]", "c[a-e]"]


@pytest.mark.parametrize("a", "ab")
@pytest.mark.parametrize("b", "cd")
def test_pytest_names_the_values_apart(request, a, b):
    assert request.node.callspec._idlist == [b, a]
    assert (request.node.get_closest_marker("one_isa") is None) == ((a, b) != ("b", "d"))
