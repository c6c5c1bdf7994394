"""Does the copy that moeopt works on compute what the model does? Asked where no comparison of a rewrite asks it."""

from __future__ import annotations

from torch import nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.verification.model import end_to_end

_TRIES = 2
"""Kernels that add in another order each time may let one comparison fail by chance, and not the next."""


def check_copy(source: nn.Module, twin: nn.Module, call: ArgsKwargs) -> None:
    """``UsageError`` where ``twin``, a copy of ``source`` with nothing rewritten, gives other results on the call.

    A copy has its own of every object that the model's attributes lead to. Code that reaches the same object by a
    closure or a global too then changes one and reads the other. A model whose own results differ from call to call,
    or that does not run on the call, is not judged.
    """
    for _ in range(_TRIES):
        try:
            found = end_to_end(source, twin, *call, greedy_steps=0)
            if found.passed is not False or not end_to_end(source, source, *call, greedy_steps=0).passed:
                return
        except Exception:  # of the model itself, which does not run without what capture puts in its place (meta)
            return
    name = type(source).__name__
    raise UsageError(
        f"a copy of {name}, with nothing rewritten, computes something else than {name}: {found.reason}. moeopt works "
        "on a copy (copy.deepcopy that shares the weights), and code of the model seems to reach an object both by an "
        "attribute and by a closure or a global, which in a copy are two objects: let the code reach that object by "
        "one way, by attributes of the model, or give the object a __deepcopy__ that returns itself"
    )
