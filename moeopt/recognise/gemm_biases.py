"""The bias of a linear site: an operand of the matmul itself, or the ``add`` that alone reads the matmul's result.

Legend: R rows, M outputs.
"""

from __future__ import annotations

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.ir.weight_refs import VectorRef
from moeopt.recognise.gemm_site import GemmSite, is_weight
from moeopt.recognise.weight_source import element_source
from moeopt.value_types import PyObject


def attach_bias(tape: Tape, site: GemmSite, memo: dict[fx.Node, bool]) -> None:
    """Take the bias of addmm/baddbmm, or of the ``add`` that alone reads a matmul, into the site."""
    node = site.matmul
    name = op_name(node)
    if name in ("addmm", "baddbmm", "addmv") or (name == "linear" and len(node.args) > 2):
        bias = node.args[0] if name != "linear" else node.args[2]
        if isinstance(bias, fx.Node) and is_weight(bias, memo):
            rows = torch.arange(site.matrix.numel())
            site.biases = _biases(tape, site, bias, node.meta["shape"], site.axis_out, rows, site.blocks)
        elif isinstance(bias, fx.Node) and not _is_zero(tape, bias):
            site.matrices = []
        return
    if site.biases:
        return
    path: list[fx.Node] = []
    current = site.node
    while True:
        users = [u for u in current.users if "index" in u.meta]
        if len(users) != 1:
            return
        user = users[0]
        if op_name(user) == "add" and user.kwargs.get("alpha", 1) == 1:
            other = [a for a in user.args if a is not current]
            if len(other) == 1 and isinstance(other[0], fx.Node) and is_weight(other[0], memo):
                _take_added(tape, site, other[0], user, path)
            return
        if op_name(user) not in _RESHAPES:
            return
        path.append(user)
        current = user


_RESHAPES = ("view", "_unsafe_view", "squeeze", "unsqueeze", "reshape", "permute", "transpose", "t", "clone")


def _is_zero(tape: Tape, node: fx.Node) -> bool:
    return bool((tape.value(node) == 0).all())


def _take_added(tape: Tape, site: GemmSite, bias: fx.Node, add: fx.Node, path: list[fx.Node]) -> None:
    """Fold ``add(matmul, bias)`` into the site; ``path`` is how the matmul was reshaped on the way to it."""
    labels = torch.arange(site.matrix.numel())[:, None].expand(-1, site.matrices[0].m)
    moved = site.from_rows(labels, tape.value(site.node))
    for step in path:
        moved = step.target(moved, *step.args[1:])  # type: ignore[operator]
    shape, m = add.meta["shape"], site.matrices[0].m
    if tuple(moved.shape) != tuple(shape) or not moved.numel():
        return
    for axis in reversed(range(len(shape))):
        first = moved.narrow(axis, 0, 1)
        if shape[axis] == m and bool((moved == first).all()):
            order, per_row = first.flatten(), 1
            break
        if shape[axis] == m * site.blocks and axis == len(shape) - 1:
            order, per_row = moved.reshape(-1, m)[:, 0], site.blocks
            break
    else:
        return
    biases = _biases(tape, site, bias, tuple(shape), axis, order, per_row)
    if biases:
        site.biases, site.node, site.axis_out = biases, add, axis
        site.order = None if torch.equal(order, torch.arange(len(order))) else order


def _biases(
    tape: Tape, site: GemmSite, bias: fx.Node, shape: tuple[int, ...], axis: int, order: torch.Tensor, per_row: int
) -> list[VectorRef | None]:
    """One bias per matrix, read where each row's output adds it; [] if it is not a plain bias."""
    m = site.matrices[0].m
    found: list[VectorRef | None] = [None] * len(site.matrices)
    bias_shape = bias.meta["shape"]
    pad = len(shape) - len(bias_shape)
    if pad < 0 or axis < pad or (bias_shape[axis - pad] == 1 and m != 1):
        return []
    lead = [d for d in range(len(shape)) if d != axis]
    which = site.matrix[order].tolist()
    for at, matrix in enumerate(which):
        if matrix < 0 or found[matrix] is not None:
            continue
        row, block = divmod(at, per_row)
        index = [0] * len(shape)
        for d in reversed(lead):
            row, index[d] = divmod(row, shape[d])
        found[matrix] = _vector_along(tape, bias, index, axis, pad, bias_shape, m, block)
        if found[matrix] is None:
            return []
    return found


def _vector_along(
    tape: Tape, bias: fx.Node, index: list[int], axis: int, pad: int, shape: PyObject, m: int, block: int
) -> VectorRef | None:
    def at(j: int) -> PyObject:
        place = list(index)
        place[axis] = block * m + j
        return element_source(tape, bias, tuple(0 if s == 1 else place[d + pad] for d, s in enumerate(shape)))

    ends = [at(0), at(min(1, m - 1)), at(m - 1)]
    leaf, origin = ends[0]
    if leaf.op != "get_attr" or "constant" in leaf.meta or any(e[0] is not leaf for e in ends):
        return None
    dm = tuple(x - y for x, y in zip(ends[1][1], origin, strict=True))
    if tuple(o + (m - 1) * d for o, d in zip(origin, dm, strict=True)) != ends[2][1]:
        return None
    return VectorRef(str(leaf.target), origin, dm, m)
