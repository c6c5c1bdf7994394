"""Expert ids that a block is given, held to the range for which the rewritten block was found to be the original.

What stands between the ids and the op, where ids come from outside and the original does not drop every id that names
no expert:

    ids, weights  ->  ids_within(ids, ...), weights_within(weights, ids, ...)  ->  experts

In PyTorch an id outside the range makes the original code run. In a graph that has none, a lookup stops the run with
an index that is out of bounds; a runtime that does not check indices gives rows of NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import is_fake

from moeopt.rewrite.refused_call import Stale


@dataclass(frozen=True)
class IdRange:
    """The ids that a rewritten block takes as the original does.

    Args:
        lowest, highest: of them; None where every integer below 0, or from E on, was found to mean the same.
        wraps: whether an id below 0 counts from the last expert, as an index does in Python; such ids are no less
            than ``-E``.
    """

    lowest: int | None = None
    highest: int | None = None
    wraps: bool = False

    @property
    def free(self) -> bool:
        """Whether it holds no id back and changes none."""
        return self.lowest is None and self.highest is None and not self.wraps


ALL_IDS = IdRange()
"""Of ids that the block's own code makes, or of which it drops every one that names no expert."""


class IdOutOfRange(Stale):
    """This call names an expert that was not verified; the module is as it was."""


def ids_within(
    ids_TK: torch.Tensor, experts: int, lowest: int | None, highest: int | None, wraps: bool
) -> torch.Tensor:
    """The ids (T, K), those that wrap as 0 to E - 1; see :class:`IdRange`.

    Raises:
        IdOutOfRange: one is outside; in a compiled or exported graph an index out of bounds.
    """
    named_TK = torch.where(ids_TK < 0, ids_TK.long() + experts, ids_TK) if wraps else ids_TK
    if _has_values(ids_TK):
        _refuse(ids_TK, lowest, highest)
        return named_TK
    outside = _outside(ids_TK, lowest, highest)
    none_outside = torch.zeros(1, dtype=ids_TK.dtype, device=ids_TK.device)
    looked_up = none_outside.index_select(0, outside.long().reshape(-1))
    return torch.where(outside, torch.zeros_like(named_TK), named_TK) + looked_up.reshape(ids_TK.shape)


def weights_within(
    weights_TK: torch.Tensor, ids_TK: torch.Tensor, lowest: int | None, highest: int | None
) -> torch.Tensor:
    """The weights (T, K), NaN at ids outside the range."""
    if _has_values(ids_TK):
        return weights_TK
    return torch.where(_outside(ids_TK, lowest, highest), torch.full_like(weights_TK, float("nan")), weights_TK)


def _has_values(ids: torch.Tensor) -> bool:
    """Whether Python may look at the ids: neither a compiler, an exporter nor a CUDA graph records this call."""
    if torch.compiler.is_compiling() or is_fake(ids):
        return False
    return not (ids.is_cuda and torch.cuda.is_current_stream_capturing())


def _outside(ids: torch.Tensor, lowest: int | None, highest: int | None) -> torch.Tensor:
    below = torch.zeros_like(ids, dtype=torch.bool) if lowest is None else ids < lowest
    return below if highest is None else below | (ids > highest)


def _refuse(ids: torch.Tensor, lowest: int | None, highest: int | None) -> None:
    if not ids.numel():
        return
    least, greatest = (int(v) for v in torch.aminmax(ids))
    if (lowest is not None and least < lowest) or (highest is not None and greatest > highest):
        bad = least if lowest is not None and least < lowest else greatest
        what = " to ".join("any" if end is None else str(end) for end in (lowest, highest))
        raise IdOutOfRange(
            f"it was called with the expert id {bad}, and ids from {what} were verified: what its own code does with "
            "others (take another expert, drop the token, raise) is not in the rewritten code"
        )
