"""What is for every day and what is for the night: the mark ``sample``."""

import types

import pytest

from tests.conftest import pytest_collection_modifyitems


def item(nodeid, *marks):
    held = list(marks)
    return types.SimpleNamespace(
        nodeid=nodeid,
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
