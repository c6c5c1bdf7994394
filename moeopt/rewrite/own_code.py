"""Calls that a rewritten block leaves to its own code: those of so many tokens that its own code is the quicker there.

Both compute the same function, so this is a choice between two ways, made before the first call and kept by copies.
It is no fallback: nothing was refused, and the block still watches what of its code and its model may change.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeopt.ops import override
from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.call_guard import TENSOR
from moeopt.value_types import PyObject

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_traced_by_jit = torch._C._get_tracing_state
LOOK = 8
"""Of so many calls that are left to the own code one is guarded as others are, to tell of what has changed."""
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class OwnCode:
    """Which calls are left to a block's own code, by their number of tokens.

    Args:
        name: the block's first parameter, which holds the tokens.
        row: how many numbers of it are one token.
        sizes: how many numbers it has in the calls that are left to the own code.
    """

    name: str
    row: int
    sizes: frozenset[int] = frozenset()

    def at(self, counts: Iterable[int]) -> OwnCode:
        """For calls of so many tokens."""
        return replace(self, sizes=frozenset(self.row * count for count in counts))

    def takes(self, args: Sequence[PyObject], kwargs: Mapping[str, PyObject]) -> bool:
        """Whether a call is left to the own code: none is that a mode, a tracer or another implementation watches.

        This costs a microsecond or two of the few dozen that a small block takes, so it looks at little.
        """
        x = args[0] if args else kwargs.get(self.name)
        return (
            type(x) is Tensor
            and x.numel() in self.sizes
            and x.is_cpu
            and not _dispatch_modes()
            and not _function_modes()
            and _traced_by_jit() is None
            and override.current() is None
        )


def own_code_of(program: BlockProgram) -> OwnCode | None:
    """For no number of tokens yet; None where the first argument does not tell how many a call has."""
    first, guard = next(iter(program.signature.parameters.values()), None), program.guard
    if first is None or first.kind not in _BY_POSITION or not guard.template or guard.template[0] is not TENSOR:
        return None
    fixed = [size for size in guard.shapes[0] if size is not None]
    row = math.prod(fixed)
    return OwnCode(first.name, row) if row and len(fixed) < len(guard.shapes[0]) else None
