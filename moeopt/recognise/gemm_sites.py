"""Linear sites: every matmul of activation rows with matrices that live in Parameters.

``mm``, ``addmm``, ``bmm``, grouped and gathered matmuls and 1x1 convolutions all become the same
record: R activation rows, each multiplied by one of several (K, M) matrices, plus an optional bias.

Legend: R rows, K contracted, M outputs, B batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_matmul, is_pointwise, is_times_one, moves_rows, op_name
from moeopt.capture.tape import Tape
from moeopt.ir.weight_refs import MatrixRef, VectorRef
from moeopt.recognise.weight_source import element_source, matrix_ref, vector_ref

aten = torch.ops.aten


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


def _is_choice(node: Any) -> bool:
    """True where integers are picked by comparing floats (top-k, argmax, sort), not given."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node) in ("topk", "argmax", "argmin", "max", "min", "sort", "argsort"):
            return True
        node = node.args[0] if node.args and moves_rows(node) else None
    return False


def find_sites(tape: Tape) -> list[GemmSite]:
    """Every linear site of the tape, in execution order."""
    memo: dict[fx.Node, bool] = {}
    sites = []
    for node in tape.nodes:
        if is_matmul(node):
            site = _site(tape, node, memo)
            if site is not None:
                sites.append(site)
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
    _attach_bias(tape, site, memo)
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


def _attach_bias(tape: Tape, site: GemmSite, memo: dict[fx.Node, bool]) -> None:
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
    current = node
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
    moved = site.from_rows(labels, tape.value(site.matmul))
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
    tape: Tape, bias: fx.Node, index: list[int], axis: int, pad: int, shape: Any, m: int, block: int
) -> VectorRef | None:
    def at(j: int) -> Any:
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
