"""Module calls that were declined as a whole, remembered for the next block that lies in the same module.

The modules around a block are tried from the innermost outwards, and the outer ones (a tower of layers, the model) are
around every block of it. What was read in such a module and why it was declined does not depend on the block that was
looked for, so a model of N declined layers tries its outermost module once, not N times; also where rewritten layers
stand between them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sized

from moeopt.capture.tape import Call
from moeopt.errors import Declined


class DeclinedCalls:
    """The declined module calls of one model.

    Args:
        rewrites: what was installed so far. Each rewrite changes the code inside the modules around it, so a decline is
            forgotten when ``rewrites`` has grown.
    """

    def __init__(self, rewrites: Sized) -> None:
        self._rewrites = rewrites
        self._known: dict[int, tuple[Call, int, Declined]] = {}

    @contextlib.contextmanager
    def remembered(self, call: Call, caused_inside: bool = False) -> Iterator[None]:
        """Raise what the attempt on ``call`` raised before; else run the body, and remember its ``Declined``.

        Args:
            caused_inside: whether a cause was named inside the block that is looked for. It stands in the way of the
                modules around as well, whatever was rewritten since.
        """
        known = self._known.get(id(call))
        if known is not None and (caused_inside or known[1] == len(self._rewrites)):
            raise copy.copy(known[2])
        try:
            yield
        except Declined as err:
            # a copy: the error itself leads to the frames of the attempt, and so to the values of its traces
            self._known[id(call)] = (call, len(self._rewrites), copy.copy(err))
            raise
