"""A block in the words of a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.probe_inputs import call_specs, probe_call
from moeopt.capture.replay import ancestors
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


LONGEST_WAY = 12
"""Calls between the rows that a mask picks and a product of them: views, casts, a norm."""


def dense_reason(place: BlockCandidate) -> str:
    """Why a dense FFN was left as it is."""
    count = len(place.candidates[0].ins) + 1
    picked = _picked_by(place.candidates[0].ins[0].operand)
    if picked == "a mask":
        return (
            f"left as it is: it is {count} matmuls over the rows that a mask picks for it (as in mixture of depths, "
            "where the others pass by), and the op would run the same ones; an engine takes it too, and an "
            "`if mask.any()` around it where that does nothing else"
        )
    tokens = f"the tokens that {picked} picks for it (as in mixture of depths)" if picked else "all tokens"
    return (
        f"left as it is: it is {count} matmuls over {tokens}, and so is the op; dense='fuse' measures "
        "whether the op is quicker here"
    )


def _picked_by(rows: fx.Node) -> str:
    """What picks the ``rows``: a boolean mask or ``nonzero``, where values of tensors decide how many there are; or an
    order of the tokens; "" where nothing does."""
    for _ in range(LONGEST_WAY):
        places = [a for a in rows.all_input_nodes if a.meta.get("dtype") in (torch.bool, torch.int64)]
        if op_name(rows) == "masked_select":
            return "a mask"
        if op_name(rows) in ("index", "index_select", "gather") and places:
            made = set(map(op_name, ancestors(places)))
            if "nonzero" in made or any(a.meta["dtype"] == torch.bool for a in places):
                return "a mask"
            return next((f"a {op}" for op in ("topk", "sort", "argsort") if op in made), "")
        if not rows.args or not isinstance(rows.args[0], fx.Node):
            return ""
        rows = rows.args[0]
    return ""


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
