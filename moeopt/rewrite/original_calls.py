"""Calls that a rewritten block leaves to its own code: those of so many tokens that its own code is the quicker there.

Both compute the same function, so this is a choice between two ways, made before the first call and kept by copies.
It is no fallback: nothing was refused, and the block still watches what of its code and its model may change.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.call_guard import TENSOR

LOOK = 128
"""Of so many calls that are left to the own code one is guarded as others are, to tell of what has changed."""
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class OriginalCalls:
    """Which calls are left to a block's own code, by their number of tokens: see ``RewrittenForward.__call__``.

    None is that a mode, a tracer or another implementation of the op watches.

    Args:
        name: the block's first parameter, which holds the tokens.
        row: how many numbers of it are one token.
        sizes: how many numbers it has in the calls that are left to the own code.
        recorded: the same where gradients are recorded, in evaluation mode.
        trained: the same in training mode, where a backward pass follows.
    """

    name: str
    row: int
    sizes: frozenset[int] = frozenset()
    recorded: frozenset[int] = frozenset()
    trained: frozenset[int] = frozenset()

    def at(self, counts: Iterable[int], recorded: Iterable[int], trained: Iterable[int]) -> OriginalCalls:
        """For calls of so many tokens, for those whose gradients are recorded, and for those that are trained."""
        sizes, others, steps = (frozenset(self.row * count for count in one) for one in (counts, recorded, trained))
        return replace(self, sizes=sizes, recorded=others, trained=steps)


def original_calls_of(program: BlockProgram) -> OriginalCalls | None:
    """For no number of tokens yet; None where the first argument does not tell how many a call has."""
    first, guard = next(iter(program.signature.parameters.values()), None), program.guard
    if first is None or first.kind not in _BY_POSITION or not guard.template or guard.template[0] is not TENSOR:
        return None
    fixed = [size for size in guard.shapes[0] if size is not None]
    row = math.prod(fixed)
    return OriginalCalls(first.name, row) if row and len(fixed) < len(guard.shapes[0]) else None
