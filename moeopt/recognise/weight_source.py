"""Where a weight comes from: a matrix on the tape, traced element by element to its Parameter.

A matrix that reaches a matmul may be a slice of a stacked Parameter, a transposed view, a row of a
gather ``W[ids]``, part of a run-time ``stack`` of E Parameters, a cast copy. Every one of those ops
moves elements without changing them, so following four corners backwards is enough to tell the
Parameter, the expert's index, the orientation and the rows: no names, no shapes guessed at.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_times_one, op_name
from moeopt.capture.tape import Tape
from moeopt.ir.weight_refs import Index, MatrixRef, PartRef, VectorRef
from moeopt.value_types import FxArg

aten = torch.ops.aten


def element_source(tape: Tape, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """The leaf (Parameter, buffer, input or computed tensor) and place that ``node[index]`` is a copy of."""
    while True:
        step = _step_back(tape, node, index)
        if step is None:
            return node, index
        node, index = step


def _unravel(flat: int, shape: Index) -> Index:
    out = []
    for size in reversed(shape):
        out.append(flat % size)
        flat //= size
    return tuple(reversed(out))


def _ravel(index: Index, shape: Index) -> int:
    flat = 0
    for i, size in zip(index, shape, strict=True):
        flat = flat * size + i
    return flat


def _step_back(tape: Tape, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    if node.op != "call_function":
        return None
    name = op_name(node)
    args: tuple[Any, ...] = node.args
    if node.target is operator.getitem:
        return _from_getitem(node, index)
    if not args or not isinstance(args[0], fx.Node):
        return _from_list(tape, node, index, name)
    base: fx.Node = args[0]
    shape: Index = base.meta.get("shape", ())
    rank = len(shape)
    if name in ("clone", "_to_copy", "detach", "alias", "contiguous", "lift_fresh", "lift_fresh_copy"):
        return base, index
    if name in ("t", "transpose"):
        d0, d1 = (0, 1) if name == "t" else (int(args[1]) % rank, int(args[2]) % rank)
        if rank < 2:
            return base, index
        out = list(index)
        out[d0], out[d1] = out[d1], out[d0]
        return base, tuple(out)
    if name == "permute":
        out = [0] * rank
        for i, d in enumerate(args[1]):
            out[d % rank] = index[i]
        return base, tuple(out)
    if node.target is aten.view.dtype:  # other numbers
        return None
    if name in ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "_reshape_alias"):
        return base, _unravel(_ravel(index, node.meta["shape"]), shape)
    if name == "select":
        dim, at = int(args[1]) % rank, int(args[2])
        return base, (*index[:dim], at % shape[dim], *index[dim:])
    if name == "slice":
        dim = int(args[1]) % rank if len(args) > 1 else 0
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        step = args[4] if len(args) > 4 else 1
        size = shape[dim]
        begin = min(max(start + size if start < 0 else start, 0), size)
        return base, (*index[:dim], begin + index[dim] * step, *index[dim + 1 :])
    if name == "expand":
        pad = len(index) - rank
        return base, tuple(0 if size == 1 else i for i, size in zip(index[pad:], shape, strict=True))
    if is_times_one(node):
        return base, index
    return _step_back_by_value(tape, node, base, index)


def _step_back_by_value(tape: Tape, node: fx.Node, base: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """As :func:`_step_back`, for ops whose ids or strides decide which element is read."""
    name = op_name(node)
    args: tuple[Any, ...] = node.args
    shape: Index = base.meta.get("shape", ())
    rank = len(shape)
    if name == "index_select":
        dim = int(args[1]) % rank
        ids = tape.value(args[2])
        return base, (*index[:dim], int(ids.reshape(-1)[index[dim]]), *index[dim + 1 :])
    if name == "embedding":
        return base, (int(tape.value(args[1])[index[:-1]]), index[-1])
    if name == "index":
        return _from_index(tape, base, args[1], index, shape)
    if name == "as_strided":
        size, stride = args[1], args[2]
        offset = args[3] if len(args) > 3 and args[3] is not None else 0
        if not isinstance(size, (list, tuple)) or not _contiguous(tape, base):
            return None
        flat = offset + sum(i * s for i, s in zip(index, stride, strict=True))
        return base, _unravel(flat, shape)
    return None


def _contiguous(tape: Tape, node: fx.Node) -> bool:
    value = tape.value(node)
    return bool(value.is_contiguous() and value.storage_offset() == 0)


def _from_getitem(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    source: FxArg = node.args[0]
    item: FxArg = node.args[1]
    name, args = op_name(source), source.args
    base = args[0] if args else None
    if not isinstance(base, fx.Node):
        return None
    rank = len(base.meta["shape"])
    if name == "unbind":
        dim = int(args[1]) % rank if len(args) > 1 else 0
        return base, (*index[:dim], item, *index[dim:])
    if name in ("split", "split_with_sizes", "chunk"):
        dim = int(args[2]) % rank if len(args) > 2 else 0
        sizes = args[1]
        start = sum(sizes[:item]) if isinstance(sizes, (list, tuple)) else item * sizes
        return base, (*index[:dim], index[dim] + start, *index[dim + 1 :])
    return None


def _from_list(tape: Tape, node: fx.Node, index: Index, name: str) -> tuple[fx.Node, Index] | None:
    del tape
    if name not in ("cat", "stack") or not node.args or not isinstance(node.args[0], (list, tuple)):
        return None
    args: tuple[Any, ...] = node.args
    parts: list[fx.Node] = list(args[0])
    dim = int(args[1]) % len(node.meta["shape"]) if len(args) > 1 else 0
    if name == "stack":
        return parts[index[dim]], (*index[:dim], *index[dim + 1 :])
    at = index[dim]
    for part in parts:
        size = part.meta["shape"][dim] if len(part.meta["shape"]) > dim else 0
        if at < size:
            return part, (*index[:dim], at, *index[dim + 1 :])
        at -= size
    return None


def _from_index(
    tape: Tape, base: fx.Node, ids: list[fx.Node | None], index: Index, shape: Index
) -> tuple[fx.Node, Index] | None:
    used = [(d, i) for d, i in enumerate(ids) if i is not None]
    if len(used) != 1:
        return None
    dim, picks = used[0]
    value = tape.value(picks)
    if value.dtype == torch.bool:
        return None
    rank = value.dim()
    at = int(value[index[dim : dim + rank]])
    return base, (*index[:dim], at % shape[dim], *index[dim + rank :])


def _sub(a: Index, b: Index) -> Index:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def matrix_ref(
    tape: Tape, node: fx.Node, prefix: Index, k: int, m: int, swap: bool, start: int = 0
) -> MatrixRef | None:
    """The Parameter region behind ``node[prefix]``, a (k, m) matrix, or (m, k) where ``swap``; None if none.

    ``start`` is the first of its m outputs where the node holds more of them side by side.
    """

    def at(i: int, j: int) -> tuple[fx.Node, Index] | None:
        return element_source(tape, node, (*prefix, start + j, i) if swap else (*prefix, i, start + j))

    corners: list[Any] = [at(0, 0), at(min(1, k - 1), 0), at(0, min(1, m - 1)), at(k - 1, m - 1)]
    first = corners[0]
    if first is None or any(c is None or c[0] is not first[0] for c in corners):
        return None
    leaf, origin = first
    if leaf.op != "get_attr" or "constant" in leaf.meta:
        return None
    dk, dm = _sub(corners[1][1], origin), _sub(corners[2][1], origin)
    last = tuple(o + (k - 1) * a + (m - 1) * b for o, a, b in zip(origin, dk, dm, strict=True))
    if last != corners[3][1]:
        return None
    ref = MatrixRef(str(leaf.target), origin, dk, dm, k, m)
    return ref if _holds(tape, node, prefix, swap, start, leaf, ref) else None


def _holds(tape: Tape, node: fx.Node, prefix: Index, swap: bool, start: int, leaf: fx.Node, ref: MatrixRef) -> bool:
    """Whether the region is the matrix in between the corners too: where an index picked rows, it may not be."""
    if not _picked(node):
        return True
    whole = tape.value(leaf)
    offset, dk, dm = ref.offset_and_strides(tuple(whole.stride()))
    if dk < 0 or dm < 0:
        return True
    region = whole.as_strided((ref.k, ref.m), (dk, dm), whole.storage_offset() + offset)
    matrix = tape.value(node)[prefix]
    matrix = (matrix.t() if swap else matrix)[:, start : start + ref.m]
    return _equal(matrix.to(region.dtype), region)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """``torch.equal``, which 8-bit floats have not."""
    if a.is_floating_point() and a.dtype.itemsize == 1:
        a, b = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    return torch.equal(a, b)


def _picked(node: fx.Node) -> bool:
    """Whether an index by tensor may have picked the matrix's rows or columns one by one."""
    for _ in range(12):
        if node.op != "call_function" or not node.all_input_nodes:
            return False
        if op_name(node) in ("index", "index_select"):
            args: tuple[Any, ...] = node.args
            rank = len(args[0].meta["shape"])
            used = args[1] if op_name(node) == "index_select" else [i is not None for i in args[1]].index(True)
            if rank < 3 or used != 0:
                return True
        node = node.all_input_nodes[0]
    return False


def vector_ref(tape: Tape, node: fx.Node, prefix: Index, m: int) -> VectorRef | None:
    """The Parameter region behind the vector ``node[prefix]`` of length ``m``; None if there is none."""
    ends: list[Any] = [element_source(tape, node, (*prefix, j)) for j in (0, min(1, m - 1), m - 1)]
    if any(e is None or e[0] is not ends[0][0] for e in ends):
        return None
    leaf, origin = ends[0]
    if leaf.op != "get_attr" or "constant" in leaf.meta:
        return None
    dm = _sub(ends[1][1], origin)
    if tuple(o + (m - 1) * d for o, d in zip(origin, dm, strict=True)) != ends[2][1]:
        return None
    return VectorRef(str(leaf.target), origin, dm, m)


def _along_axes(steps: tuple[Index, ...], shape: tuple[int, ...]) -> bool:
    """Whether each dimension goes forward along one axis of the leaf, and no two along the same."""
    axes = [[a for a, s in enumerate(step) if s] for step in steps]
    used = [a[0] for a in axes if a]
    plain = all(
        len(a) == 1 and step[a[0]] > 0 if n > 1 else not a for a, step, n in zip(axes, steps, shape, strict=True)
    )
    return plain and len(set(used)) == len(used)


def part_ref(tape: Tape, node: fx.Node, values: bool = True) -> PartRef | None:
    """The region of a Parameter or buffer that ``node`` is, whatever its rank; None where it is no such view.

    ``values``: whether the tape has them, to be held against those of the region.
    """
    shape = node.meta.get("shape")
    if shape is None or 0 in shape or any(type(size) is not int for size in shape):
        return None
    zeros = (0,) * len(shape)
    found: list[Any] = [element_source(tape, node, zeros)]
    for dim, size in enumerate(shape):
        found.append(element_source(tape, node, (*zeros[:dim], min(1, size - 1), *zeros[dim + 1 :])))
    found.append(element_source(tape, node, tuple(size - 1 for size in shape)))
    leaf, origin = found[0] or (node, zeros)
    if leaf.op != "get_attr" or "constant" in leaf.meta or any(f is None or f[0] is not leaf for f in found):
        return None
    if leaf.meta["dtype"] != node.meta["dtype"]:
        return None
    steps = tuple(_sub(f[1], origin) for f in found[1:-1])
    last = tuple(o + sum((n - 1) * s[a] for n, s in zip(shape, steps, strict=True)) for a, o in enumerate(origin))
    if last != found[-1][1] or not _along_axes(steps, shape):
        return None
    ref = PartRef(str(leaf.target), origin, steps, tuple(shape))
    return ref if not values or _equal(ref.read(tape.value(leaf)), tape.value(node)) else None
