"""What a path of PyTorch calls starts, waits for and moves, counted on a CPU: no time, and no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Launches(TorchDispatchMode):
    """Counts calls that start a kernel on a GPU (views do not), calls for which the host waits, and bytes.

    ``moved`` are the bytes of all tensors that those calls take and give, each once a call.
    """

    WAITS = {"aten::nonzero", "aten::_local_scalar_dense", "aten::unique_consecutive", "aten::_unique2"}

    def __init__(self) -> None:
        super().__init__()
        self.started = self.waits = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.started += not views
        self.waits += func._schema.name in self.WAITS
        if not views:
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
        with torch.no_grad(), Launches() as counted:
            run()
        seen[h, i] = counted
    one = seen[1, 1]
    both = seen[2, 2].moved - seen[2, 1].moved - seen[1, 2].moved + one.moved
    of_h, of_i = (seen[at].moved - one.moved - both for at in ((2, 1), (1, 2)))
    rest = one.moved - of_h - of_i - both
    return Counts(one.started, one.waits, rest + of_h * H // SMALL + of_i * I // SMALL)
