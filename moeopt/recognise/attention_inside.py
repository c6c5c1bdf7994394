"""Why experts that attend are left alone: among tokens, or among the parts of one row."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.recurrences import rows_given
from moeopt.recognise.unnamed import Unnamed

_ATTENDS = (
    "between its experts' matmuls stands attention or a softmax: the experts are projections around it (a mixture "
    "inside attention), or mix their tokens by it; only functions of each token's own row are grouped, so this block "
    "stays as it is"
)
_WITHIN = (
    "its experts attend (scaled_dot_product_attention) among parts of each token's own row, beside something that "
    "depends on other rows or on a row's place among them"
)
_AMONG_PARTS = (
    "its experts attend (scaled_dot_product_attention) among parts of each token's own row, and lay the parts out "
    "before the rows, as nn.MultiheadAttention does; with q, k and v as (rows, heads, parts, features) throughout, "
    "F.scaled_dot_product_attention(q, k, v) is carried"
)


def attends(tape: Tape, node: fx.Node, experts: Collection[nn.Module], line: str) -> Declined:
    """The reason for the call ``node``, at ``line``, in which rows or their parts meet in one of the ``experts``."""
    shape: tuple[int, ...] = node.all_input_nodes[0].meta["shape"]
    whole = "scaled_dot_product" in op_name(node) and len(shape) > 2
    rows = rows_given(tape, node.meta["call"], experts)
    if not whole or shape[0] != rows:
        return Declined(_ATTENDS, line)
    return Declined(_AMONG_PARTS, line) if _turned(node, rows) else Unnamed(_WITHIN, line)


def _turned(node: fx.Node, rows: int) -> bool:
    """Whether the ``rows`` stood behind other dimensions before they came to ``node``."""
    shapes: list[tuple[int, ...]] = [n.meta.get("shape") or () for n in ancestors([node])]
    return any(len(shape) > 2 and shape[0] != rows and rows in shape[1:-1] for shape in shapes)
