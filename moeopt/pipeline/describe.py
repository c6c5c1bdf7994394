"""A block in the words of a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from moeopt.capture.probe_inputs import call_specs, probe_call
from moeopt.capture.tape import Tape, record
from moeopt.errors import CaptureError
from moeopt.find.block_candidates import BlockCandidate
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router import RouterReading, recognize_outer_router
from moeopt.value_types import PyObject

LEVELS_UP = 2
"""How far above the rewritten module its router is looked for, where ids and weights are arguments."""

SHORT = 256
"""Tokens of a real call that may be run again for it."""


def dense_reason(place: BlockCandidate) -> str:
    """Why a dense FFN was left as it is."""
    count = len(place.candidates[0].ins) + 1
    return (
        f"left as it is: it is {count} matmuls over all tokens, and so is the op; dense='fuse' measures "
        "whether the op is quicker here"
    )


def read_router(
    model: nn.Module, path: str, calls: Mapping[str, Any], recognition: Recognition, inside: RouterReading
) -> RouterReading:
    """The router of rewritten experts: read ``inside`` the module at ``path``, else on a short run of one around it.

    Args:
        calls: real calls of the modules around, by path; a call of a few made-up tokens is made from one.
    """
    if not inside.outside:
        return inside
    module, around = model.get_submodule(path), path
    for _ in range(LEVELS_UP):
        if not around:
            break
        around = around.rpartition(".")[0]
        if around not in calls:
            continue
        try:
            reading = recognize_outer_router(
                _short_tape(model.get_submodule(around), calls[around]), module, recognition
            )
        except Exception as err:  # the report's words must not fail a model that was rewritten
            return dataclasses.replace(inside, reason=f"{around or 'the model'} does not run alone ({err})"[:300])
        if not reading.outside:
            return reading
    return inside


def _short_tape(module: nn.Module, call: PyObject) -> Tape:
    """A run of a few made-up tokens, or the call itself where it is short and fits no other number of them."""
    call_spec = next(call_specs(*call))
    try:
        return record(module, *probe_call(call_spec, 22, seed=11, variant=1))
    except CaptureError:
        if math.prod(call_spec.grid) > SHORT:
            raise
        return record(module, *call)


def describe_router(recognition: Recognition, reading: RouterReading) -> str:
    """How the tokens are routed, in one line."""
    return reading.text + (", weight on input" if recognition.spec.weight_on == "input" else "")
