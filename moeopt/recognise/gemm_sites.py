"""Linear sites: every matmul of activation rows with matrices that live in Parameters.

``mm``, ``addmm``, ``bmm``, grouped and gathered matmuls and 1x1 convolutions all become the same
record: R activation rows, each multiplied by one of several (K, M) matrices, plus an optional bias.

Legend: R rows, K contracted, M outputs, B batches.
"""

from __future__ import annotations

import torch
from torch import fx

from moeopt.capture.op_kinds import is_matmul, op_name
from moeopt.capture.tape import Tape
from moeopt.ir.weight_refs import MatrixRef
from moeopt.recognise.gemm_biases import attach_bias
from moeopt.recognise.gemm_site import GemmSite, is_computed_weight, is_weight
from moeopt.recognise.parted_sites import parts_of
from moeopt.recognise.weight_source import element_source, matrix_ref, vector_ref

__all__ = ["GemmSite", "find_sites", "is_computed_weight", "is_weight", "weight_and_operand"]

aten = torch.ops.aten


def find_sites(tape: Tape) -> list[GemmSite]:
    """Every linear site of the tape, in execution order."""
    memo: dict[fx.Node, bool] = {}
    sites = []
    for node in tape.nodes:
        if is_matmul(node):
            site = _site(tape, node, memo)
            if site is None:
                continue
            parts = parts_of(tape, site)
            for part in parts:
                attach_bias(tape, part, memo)
            sites += parts or [site]
    return sites


def weight_and_operand(node: fx.Node, memo: dict[fx.Node, bool]) -> tuple[fx.Node, fx.Node, bool] | None:
    """(weight, activation, weight is on the left) for a matmul call, or None."""
    name, args = op_name(node), node.args
    shift = 1 if name in ("addmm", "baddbmm", "addmv") else 0
    left, right = args[shift], args[shift + 1]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    on_left, on_right = is_weight(left, memo), is_weight(right, memo)
    if on_left and on_right:  # two weights: a gathered one (an embedding by index) is the activation
        gathered_left = _gathered(left)
        if gathered_left == _gathered(right):
            return None
        on_left, on_right = not gathered_left, gathered_left
    if on_right:
        return right, left, False
    if on_left and name not in ("convolution", "linear", "_grouped_mm", "grouped_mm_fallback"):
        return left, right, True
    return None


def _gathered(node: fx.Node) -> bool:
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if op_name(node) in ("index", "index_select", "gather", "embedding"):
            return True
        node = node.args[0]
    return False


def _site(tape: Tape, node: fx.Node, memo: dict[fx.Node, bool]) -> GemmSite | None:
    found = weight_and_operand(node, memo)
    if found is None:
        return None
    weight, operand, left = found
    name = op_name(node)
    build = {
        "mm": _plain, "addmm": _plain, "mv": _plain, "addmv": _plain, "bmm": _batched, "baddbmm": _batched,
        "_grouped_mm": _grouped, "grouped_mm_fallback": _grouped, "convolution": _pointwise_conv, "linear": _linear,
    }.get(name)  # fmt: skip
    if build is None:
        return None
    site = build(tape, node, weight, operand, left)
    if site is None:
        return None
    attach_bias(tape, site, memo)
    return site


def _blocks(
    tape: Tape, weight: fx.Node, prefix: tuple[int, ...], k: int, m: int, swap: bool, count: int = 0
) -> list[MatrixRef]:
    """The matrix as one ref, or as equal column blocks (``count`` of them, if known) that each lie in a Parameter."""
    if count in (0, 1):
        whole = matrix_ref(tape, weight, prefix, k, m, swap)
        if whole is not None:
            return [whole]
    for blocks in [count] if count else range(2, m + 1):
        if m % blocks:
            continue
        refs = [matrix_ref(tape, weight, prefix, k, m // blocks, swap, i * (m // blocks)) for i in range(blocks)]
        if all(r is not None for r in refs):
            return [r for r in refs if r is not None]
    return []


def _plain(tape: Tape, node: fx.Node, weight: fx.Node, operand: fx.Node, left: bool) -> GemmSite | None:
    if op_name(node) in ("mv", "addmv"):
        if not left:
            return None
        m, k = weight.meta["shape"]
        ref = matrix_ref(tape, weight, (), k, m, swap=True)
        return GemmSite(node, node, operand, 0, 0, [ref], torch.zeros(1, dtype=torch.long)) if ref else None
    wk, wm = weight.meta["shape"] if not left else weight.meta["shape"][::-1]
    refs = _blocks(tape, weight, (), wk, wm, swap=left)
    if not refs:
        return None
    axis = 0 if left else 1
    rows = operand.meta["shape"][1 - axis]
    matrix = torch.arange(len(refs)).repeat(rows)
    return GemmSite(node, node, operand, axis, axis, refs, matrix, blocks=len(refs))


def _linear(tape: Tape, node: fx.Node, weight: fx.Node, operand: fx.Node, left: bool) -> GemmSite | None:
    m, k = weight.meta["shape"]
    ref = matrix_ref(tape, weight, (), k, m, swap=True)
    rows = operand.meta["shape"]
    count = 1
    for size in rows[:-1]:
        count *= size
    axis = len(rows) - 1
    return GemmSite(node, node, operand, axis, axis, [ref], torch.zeros(count, dtype=torch.long)) if ref else None


def _batched(tape: Tape, node: fx.Node, weight: fx.Node, operand: fx.Node, left: bool) -> GemmSite | None:
    b, d1, d2 = weight.meta["shape"]
    k, m = (d2, d1) if left else (d1, d2)
    axis = 1 if left else 2
    rows = operand.meta["shape"][3 - axis]
    if b == 1:
        refs = _blocks(tape, weight, (0,), k, m, swap=left)
        if not refs:
            return None
        return GemmSite(node, node, operand, axis, axis, refs, torch.arange(len(refs)).repeat(rows), blocks=len(refs))
    known: dict[MatrixRef, int] = {}
    picks = []
    blocks = 0
    for i in range(b):
        refs = _blocks(tape, weight, (i,), k, m, swap=left, count=blocks)
        if not refs:
            return None
        blocks = len(refs)
        picks.append([known.setdefault(ref, len(known)) for ref in refs])
    matrix = torch.tensor(picks).repeat_interleave(rows, 0).flatten()
    return GemmSite(node, node, operand, axis, axis, list(known), matrix, blocks=blocks)


def _grouped(tape: Tape, node: fx.Node, weight: fx.Node, operand: fx.Node, left: bool) -> GemmSite | None:
    offs = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    if not isinstance(offs, fx.Node) or len(operand.meta["shape"]) != 2 or len(weight.meta["shape"]) != 3:
        return None
    ends = tape.value(offs).long()
    e, k, m = weight.meta["shape"]
    refs = [matrix_ref(tape, weight, (i,), k, m, swap=False) for i in range(e)]
    if any(r is None for r in refs):
        return None
    matrix = torch.searchsorted(ends, torch.arange(operand.meta["shape"][0]), right=True)
    matrix[matrix >= e] = -1  # rows beyond the last offset belong to no expert
    return GemmSite(node, node, operand, 1, 1, [r for r in refs if r is not None], matrix)


def _pointwise_conv(tape: Tape, node: fx.Node, weight: fx.Node, operand: fx.Node, left: bool) -> GemmSite | None:
    _, _, bias, stride, padding, _, transposed, _, groups = node.args[:9]
    shape = weight.meta["shape"]
    if any(s != 1 for s in shape[2:]) or transposed or groups != 1:
        return None
    if any(s != 1 for s in stride) or any(p != 0 for p in padding):  # type: ignore[union-attr]
        return None
    m, k = shape[:2]
    zeros = (0,) * (len(shape) - 2)
    refs = [_conv_ref(tape, weight, k, m, zeros)]
    if refs[0] is None:
        return None
    sizes = operand.meta["shape"]
    rows = sizes[0]
    for s in sizes[2:]:
        rows *= s
    site = GemmSite(node, node, operand, 1, 1, [refs[0]], torch.zeros(rows, dtype=torch.long))
    if isinstance(bias, fx.Node):
        site.biases = [vector_ref(tape, bias, (), m)]
    return site


def _conv_ref(tape: Tape, weight: fx.Node, k: int, m: int, zeros: tuple[int, ...]) -> MatrixRef | None:
    leaf, origin = element_source(tape, weight, (0, 0, *zeros))  # type: ignore[misc]
    if leaf.op != "get_attr" or "constant" in leaf.meta or leaf.meta["shape"] != (m, k, *(1 for _ in zeros)):
        return None
    return MatrixRef(str(leaf.target), origin, (0, 1, *zeros), (1, 0, *zeros), k, m)
