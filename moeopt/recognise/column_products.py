"""Experts that multiply columns: W @ x[..., None], the features on the last axis but one.

The reading takes a token's features from a tensor's last axis, where a product by the right has them, and says so where
it found no experts: `x @ W.t()` is the same numbers.
"""

from __future__ import annotations

from torch import fx

from moeopt.capture.op_kinds import is_matmul, moves_rows, op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.gemm_sites import weight_and_operand


def column_products(tape: Tape) -> Declined | None:
    """The reason for a block that multiplies columns by parts of a stack, one behind the other; None where it does
    not."""
    named = dict(tape.root.named_parameters(remove_duplicate=False))
    memo: dict[fx.Node, bool] = {}
    columns: list[fx.Node] = []
    for node in tape.nodes:
        found = weight_and_operand(node, memo) if is_matmul(node) else None
        if found is None or not _is_column(node, found[1], found[2]):
            continue
        held = [named[str(n.target)] for n in ancestors([found[0]]) if n.op == "get_attr" and str(n.target) in named]
        if any(p.dim() > 2 for p in held):
            columns.append(node)
    if len(columns) < 2 or not any(c in ancestors([columns[-1]]) for c in columns[:-1]):
        return None
    return Declined(
        "its experts multiply columns by their matrices (W @ x[..., None]), and experts are read as functions of rows; "
        "write x @ W.t() without the last axis, and give each mixture a module of its own",
        columns[0].meta.get("source"),
    )


def _is_column(product: fx.Node, operand: fx.Node, on_left: bool) -> bool:
    """Whether a product takes columns of one number each: (..., d, 1) by a weight on its left, as it is or turned
    around by ``torch.matmul``."""
    if on_left and op_name(product) in ("bmm", "baddbmm"):
        size: tuple[int, ...] = operand.meta["shape"]
        return size[-1] == 1 < size[-2]
    while moves_rows(operand) and operand.all_input_nodes:
        turned, operand = operand, operand.all_input_nodes[0]
        shape: tuple[int, ...] = operand.meta.get("shape") or ()
        if op_name(turned) == "transpose" and len(shape) > 2 and shape[-1] == 1 < shape[-2]:
            return bool(turned.meta["shape"][-2] == 1)
    return False
