"""What a path of PyTorch calls starts, waits for and moves, counted on a CPU: no time, and no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moeopt.ops.kernels.counted import Launches


class Moved(Launches):
    """Counts bytes too: ``moved`` are those of all tensors that a call with a kernel takes and gives, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.started
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.started > before:
            held = {id(t): t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            self.moved += sum(held.values())
        return out


class Counts(NamedTuple):
    """Of one call: kernels (an ATen call is taken for one), waits of the host, bytes moved beside the weights."""

    launches: int
    waits: int
    bytes: int


SMALL = 8
"""Widths at which is counted: bfloat16 rows of 16 bytes, as ``grouped_mm`` asks for."""


def counts(call: Callable[[int, int], Callable[[], Tensor]], H: int, I: int) -> Counts:
    """The counts of ``call(H, I)()`` from calls with small widths: launches do not depend on them.

    Bytes are ``a + b * H + c * I + d * H * I``: the activations' and, in ``d``, the weights', which are left out.
    """
    seen = {}
    for h, i in ((1, 1), (2, 1), (1, 2), (2, 2)):
        run = call(h * SMALL, i * SMALL)
        with torch.no_grad(), Moved() as counted:
            run()
        seen[h, i] = counted
    one = seen[1, 1]
    both = seen[2, 2].moved - seen[2, 1].moved - seen[1, 2].moved + one.moved
    of_h, of_i = (seen[at].moved - one.moved - both for at in ((2, 1), (1, 2)))
    rest = one.moved - of_h - of_i - both
    return Counts(one.started, one.waits, rest + of_h * H // SMALL + of_i * I // SMALL)
