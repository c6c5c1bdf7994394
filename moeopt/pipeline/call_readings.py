"""The readings of one call of a block, in the order in which a capture tries them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moeopt.capture.call_roles import CallSpec
from moeopt.capture.probe_inputs import call_specs
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import Declined
from moeopt.obstacles import Rank


def call_readings(call: ArgsKwargs) -> Iterator[CallSpec]:
    """Readings of the call, in the order in which a capture tries them.

    A reading with a constant mask comes twice: first with both values in the mask, since a mask of ones does not show
    what the model does where the mask is 0; then with the mask as given, for code that accepts no other mask. Last come
    the readings whose columns of whole numbers keep their values, for code in which such columns are ids.
    """
    readings = list(call_specs(*call))
    for call_spec in readings:
        if call_spec.constant_masks():
            yield dataclasses.replace(call_spec, flip_masks=True)
        yield call_spec
    yield from (
        dataclasses.replace(call_spec, kept_columns=True) for call_spec in readings if call_spec.has_whole_columns()
    )


def may_hold_ids(call_spec: CallSpec, err: Declined) -> bool:
    """Whether numbers of the call may be ids, of which made-up ones are none, and that is still to be tried."""
    return not call_spec.kept_columns and err.rank <= Rank.READING and call_spec.has_whole_columns()
