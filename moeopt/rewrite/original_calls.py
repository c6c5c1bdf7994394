"""Calls that a rewritten block leaves to its original code, because that is quicker at their number of tokens.

Both compute the same function, so this is a choice of speed, made before the first call and kept by copies. It is no
fallback: no call was refused, and the block still watches its code and its model for changes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.call_guard import TENSOR

LOOK = 128
"""One of so many calls that are left to the original code is guarded like the others, to report changes."""
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class OriginalCalls:
    """Which calls are left to a block's original code, by their number of tokens: see ``RewrittenForward.__call__``.

    A call under a mode, a tracer or another implementation of the op is never left to it.

    Args:
        name: the block's first parameter, which holds the tokens.
        row: the number of elements of one token.
        sizes: the numbers of elements at which calls without gradients are left to the original code.
        recorded: the same for calls whose gradients are recorded, in evaluation mode.
        trained: the same for calls in training mode, where a backward pass follows.
    """

    name: str
    row: int
    sizes: frozenset[int] = frozenset()
    recorded: frozenset[int] = frozenset()
    trained: frozenset[int] = frozenset()

    def at(self, counts: Iterable[int], recorded: Iterable[int], trained: Iterable[int]) -> OriginalCalls:
        """The same block with other numbers of tokens: without gradients, with recorded ones, and in training."""
        sizes, others, steps = (frozenset(self.row * count for count in one) for one in (counts, recorded, trained))
        return replace(self, sizes=sizes, recorded=others, trained=steps)


def original_calls_of(program: BlockProgram) -> OriginalCalls | None:
    """``OriginalCalls`` without any call yet; None where the first argument does not hold the tokens."""
    first, guard = next(iter(program.signature.parameters.values()), None), program.guard
    if first is None or first.kind not in _BY_POSITION or not guard.template or guard.template[0] is not TENSOR:
        return None
    fixed = [size for size in guard.shapes[0] if size is not None]
    row = math.prod(fixed)
    return OriginalCalls(first.name, row) if row and len(fixed) < len(guard.shapes[0]) else None
