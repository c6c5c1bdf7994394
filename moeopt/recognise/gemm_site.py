"""One linear site: a matmul of activation rows with matrices that live in Parameters, and what counts as a weight.

Legend: R rows, K contracted, M outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from moeopt.capture.op_kinds import is_matmul, is_pointwise, is_times_one, moves_rows, op_name
from moeopt.ir.weight_refs import MatrixRef, VectorRef
from moeopt.value_types import FxArg


@dataclass(eq=False)
class GemmSite:
    """One matmul call. ``node`` is its output after the bias.

    ``rows_of(value)`` turns an operand or output tensor into (R, features): ``axis_in`` / ``axis_out``
    name the feature axis. ``matrix`` gives each row's index into ``matrices``. ``blocks`` > 1 means
    that one matmul serves several experts side by side: output row r holds ``blocks`` rows. ``order``:
    where the output was permuted before its bias, the row that stands at each place of it.
    """

    node: fx.Node
    matmul: fx.Node
    operand: fx.Node
    axis_in: int
    axis_out: int
    matrices: list[MatrixRef]
    matrix: torch.Tensor
    biases: list[VectorRef | None] = field(default_factory=list)
    blocks: int = 1
    order: torch.Tensor | None = None

    def rows_in(self, value: torch.Tensor) -> torch.Tensor:
        """The activation operand as (R, K) rows; each stands ``blocks`` times."""
        rows = value.movedim(self.axis_in, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        return rows.repeat_interleave(self.blocks, 0) if self.blocks > 1 else rows

    def rows_out(self, value: torch.Tensor) -> torch.Tensor:
        """The output as (R, M) rows."""
        rows = value.movedim(self.axis_out, -1).reshape(-1, self.matrices[0].m)
        return rows if self.order is None else rows[torch.argsort(self.order)]

    def from_rows(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`rows_out`: rows laid out in the shape of the output ``like``."""
        shape = like.movedim(self.axis_out, -1).shape
        rows = rows if self.order is None else rows[self.order]
        return rows.reshape(shape).movedim(-1, self.axis_out).contiguous()


def is_weight(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """True where ``node`` is made of Parameters alone, moved, cast or gathered by any index."""
    known = memo.get(node)
    if known is not None:
        return known
    if node.op == "get_attr":
        answer = "constant" not in node.meta
    elif op_name(node) == "embedding":  # picked by a choice, a matrix per token; by token ids, the tokens themselves
        answer = _is_choice(node.args[1]) and is_weight(node.args[0], memo)  # type: ignore[arg-type]
    elif is_times_one(node):  # how vmap writes a bias
        answer = is_weight(node.args[0], memo)  # type: ignore[arg-type]
    elif node.op != "call_function" or not (moves_rows(node)):
        answer = False
    else:
        name = op_name(node)
        first = node.args[0] if node.args else None
        if name in ("cat", "stack") and isinstance(first, (list, tuple)):
            answer = all(is_weight(n, memo) for n in first if isinstance(n, fx.Node)) and bool(first)
        elif name in ("index_put", "slice_scatter", "select_scatter", "scatter", "copy", "masked_scatter"):
            answer = False
        else:
            answer = isinstance(first, fx.Node) and is_weight(first, memo)
    memo[node] = answer
    return answer


def is_computed_weight(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """True for what is computed from Parameters and buffers alone: dequantised or low-rank weights."""
    if node.op != "call_function" or is_weight(node, memo) or not (is_pointwise(node) or is_matmul(node)):
        return False
    inputs = node.all_input_nodes
    return len(node.meta.get("shape") or ()) > 1 and bool(inputs) and all(is_weight(n, memo) for n in inputs)


def _is_choice(node: FxArg) -> bool:
    """True where integers are picked by comparing floats (top-k, argmax, sort), not given."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node) in ("topk", "argmax", "argmin", "max", "min", "sort", "argsort"):
            return True
        node = node.args[0] if node.args and moves_rows(node) else None
    return False
