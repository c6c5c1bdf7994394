"""An engine in at most three attempts: what an attempt took for granted and turned out not to hold is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moeopt.backends.made import Made
from moeopt.backends.onnxrt.rounded_activations import RoundingDeclined
from moeopt.errors import NotEquivalentError
from moeopt.lower.functional import traces_with
from moeopt.options import Options
from moeopt.value_types import PyObject

Make = Callable[[Options, PyObject], Made]
"""Options and the plan that they ask for -> an engine, of a copy of the model that is its own."""


def attempts(make: Make, options: Options, plan: PyObject, plan_of: Callable[[Options], PyObject]) -> Made:
    """``make(options, plan)``; made again where alike layers were not alike, or activations cannot be rounded here.

    Raises:
        NotEquivalentError: as ``make``, in the last attempt.
    """
    try:
        return _traced(make, options, plan)
    except RoundingDeclined as err:  # the forms that were chosen for it are slow without it
        note = f"activations stay floats: {err}"
    assert options.quantize is not None, "what rounds was asked for by a plan"
    options.say(note)
    options = dataclasses.replace(options, quantize=dataclasses.replace(options.quantize, activations="float"))
    made = _traced(make, options, plan_of(options))
    made.certificate.notes = [*made.certificate.notes, note]
    made.report = dataclasses.replace(made.report, notes=(*made.report.notes, note))
    return made


def _traced(make: Make, options: Options, plan: PyObject) -> Made:
    try:
        with traces_with(each_layer=options.verify == "off") as traces:  # where nothing would tell a wrong one
            return make(options, plan)
    except NotEquivalentError:
        if not traces.unproved:
            raise
    options.say("tracing every layer: one that was traced for its like may not be like them")
    with traces_with(each_layer=True):
        return make(options, plan)
