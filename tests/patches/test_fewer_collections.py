"""The collector's settings are the user's again afterwards."""

import gc

import pytest

from moeopt.patches import fewer_collections


@pytest.mark.parametrize(("before", "inside"), [((700, 10, 10), 20_000), ((0, 10, 10), 0), ((50_000, 5, 5), 50_000)])
def test_settings_come_back_whatever_happens(before, inside):
    kept = gc.get_threshold()
    gc.set_threshold(*before)
    try:
        with pytest.raises(ZeroDivisionError), fewer_collections():
            assert gc.get_threshold()[0] == inside
            raise ZeroDivisionError
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*kept)
