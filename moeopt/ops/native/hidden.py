"""What a call of the kernel keeps for a backward pass, and where its words say so.

Shape legend: T tokens, K chosen per token, I intermediate.
"""

from __future__ import annotations

from array import array

from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.native.matrices import ABSENT, NO_MATRIX
from moeopt.ops.reference import dtypes

KEPT = 32
"""The word of a ``moeopt_call`` that is the address of what is kept of h; the next is how far its rows are apart."""
_OUT = 2
"""The word of a ``moeopt_matrix`` that says how many rows it has."""
_SECOND = len(NO_MATRIX)
"""The words of one, behind which the second matrix of a ``moeopt_expert`` begins."""
_ENTRY = 3 * len(NO_MATRIX) + 4 * len(ABSENT)
"""The words of a ``moeopt_expert``."""


class Hidden:
    """What a kernel keeps of h, the products of W_in with their bias, for a backward pass.

    Attributes:
        rows: (T K, I), or gates beside ups (T K, 2I), in the compute dtype: of each pair (token, slot) that names an
            expert, by their experts, tokens and slots; garbage behind them. None where nothing was kept.
    """

    rows: Tensor | None = None

    def place(self, words: array[int], x: Tensor, spec: ExpertsSpec, entries: array[int]) -> Tensor | None:
        """Make room for the h of a call on experts of these entries, and write into its words where that is.

        None where the experts differ in how many numbers of h they have.
        """
        firsts, seconds = entries[_OUT::_ENTRY], entries[_SECOND + _OUT :: _ENTRY]
        widths = {one + two for one, two in zip(firsts, seconds, strict=True)}
        if len(widths) != 1:
            return None
        (width,) = widths
        rows = x.new_empty(words[2] * words[3], width, dtype=dtypes(x, spec)[0])
        words[KEPT], words[KEPT + 1] = rows.data_ptr(), width
        return rows
