"""Does the dispatch ask the routing weights which rows an expert gets, beside the ids or in their place?

    rows = torch.where(table[:, e] != 0)[0]     a row whose weight is zero is left out: 0 * inf is never computed
    rows = torch.where(ids == e)[0]             a row of any weight is computed

The two differ where a weight underflows, in float16 the score of an unlikely expert, and its expert overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.recognise.ids_of_masks import ids_not_zero, ids_positive

LeaveOut = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""ids (T, K), weights (T, K), E -> ids, with E for those of which the dispatch takes no row."""
_ROWS = ("nonzero", "masked_select")
_OF_MASKS = ("any", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "__and__", "__or__")
_DEPTH = 8


def left_out(weights: Iterable[fx.Node]) -> LeaveOut | None:
    """What leaves out the rows that the dispatch leaves out by the values of ``weights``; None where it does not ask.

    Args:
        weights: the nodes of a tape that hold the routing weights. Looked at is what moves them alone, to a table of
            all experts for instance, so that each asks the weight itself.
    """
    asked: set[str] = set()
    for node in weights:
        asked |= _asked(node, _DEPTH)
    return {frozenset(["ne"]): ids_not_zero, frozenset(["gt"]): ids_positive}.get(frozenset(asked))


def _asked(node: fx.Node, depth: int) -> set[str]:
    """The comparisons with zero, of what moves ``node``, by which rows are picked; ``nonzero`` asks ``!= 0``."""
    asked: set[str] = set()
    for user in node.users:
        name = op_name(user)
        dtype = user.meta.get("dtype")
        if name in _ROWS:
            asked |= {"ne"} if name == "nonzero" else set()
        elif name in ("ne", "gt") and user.args[0] is node and user.args[1] == 0:
            asked |= {name} if _picks_rows(user, depth) else set()
        elif name == "_to_copy" and dtype is torch.bool:
            asked |= {"ne"} if _picks_rows(user, depth) else set()
        elif depth and moves_rows(user) and (dtype is None or dtype.is_floating_point):
            asked |= _asked(user, depth - 1)
    return asked


def _picks_rows(mask: fx.Node, depth: int) -> bool:
    """Whether rows are picked where ``mask`` is set."""
    for user in mask.users:
        name = op_name(user)
        if name in _ROWS or (name == "index" and mask in (user.args[1] or ())):  # type: ignore[operator]
            return True
        if depth and (moves_rows(user) or name in _OF_MASKS) and _picks_rows(user, depth - 1):
            return True
    return False
