"""A scale of each output that stands behind a product of codes, as a scale of the codes.

    (x @ q.t()) * s    ==    x @ (q * s[:, None]).t()          s of each output, or one for all

Either way is one rounding a term, and the kernels that read codes multiply sums by the scale: it is their own form.
Shape legend: N out, K in, M rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeopt.ir.row_function import RowBody, RowCount, Value
from moeopt.value_types import PyObject

_MM, _LINEAR = torch.ops.aten.mm.default, torch.ops.aten.linear.default
_MUL, _VIEW = torch.ops.aten.mul.Tensor, torch.ops.aten.reshape.default
Node = tuple[Any, tuple[Any, ...], dict[str, Any]]


def scales_first(body: RowBody) -> RowBody:
    """``body`` with such scales in front of their products; itself where there are none, or rows of 16 bits.

    Rows of 16 bits would be rounded at another place: sums are, before they are multiplied.
    """
    if body.dtype is not torch.float32:
        return body
    first = 1 + len(body.slots)
    behind = _scaled(body, first)
    if not behind:
        return body
    nodes: list[Node] = []
    new = dict(enumerate(map(Value, range(first))))

    def add(op: PyObject, *args: PyObject, **kwargs: PyObject) -> Value:
        nodes.append((op, args, kwargs))
        return Value(first + len(nodes) - 1)

    def word(arg: PyObject) -> PyObject:
        if isinstance(arg, Value):
            return new[int(arg)]
        return [word(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

    products = set(behind.values())
    for number, (op, args, kwargs) in enumerate(body.nodes, first):
        if number in products:
            continue  # it is made where its scale is there
        if number not in behind:
            new[number] = add(op, *map(word, args), **{k: word(v) for k, v in kwargs.items()})
            continue
        product, (x, w), _ = body.nodes[behind[number] - first]
        scale = args[1] if args[0] == behind[number] else args[0]
        shaped = add(_VIEW, word(scale), [1, -1] if product is _MM else [-1, 1])
        new[number] = add(product, word(x), add(_MUL, word(w), shaped))
    return RowBody(body.features, body.dtype, body.slots, tuple(nodes), int(new[body.out]), body.out_features)


def _scaled(body: RowBody, first: int) -> dict[int, int]:
    """{number of a multiplication: number of the product that it scales by an output's number of slots alone}."""
    made = _made(body, first)
    readers: dict[int, list[int]] = {}
    for number, (_, args, kwargs) in enumerate(body.nodes, first):
        for value in _values([args, kwargs]):
            readers.setdefault(value, []).append(number)
    found = {}
    for number, (op, args, kwargs) in enumerate(body.nodes, first):
        w = made.get(int(args[1])) if op in (_MM, _LINEAR) and len(args) == 2 and isinstance(args[1], Value) else None
        after = readers.get(number, [])
        if w is None or kwargs or len(after) != 1 or number == body.out or args[0] == args[1]:
            continue
        times, factors, more = body.nodes[after[0] - first]
        scales = [made.get(int(v)) for v in factors if isinstance(v, Value) and v != number]
        if times is not _MUL or more or len(scales) != 1 or scales[0] is None or len(set(factors)) != 2:
            continue
        outputs, shape = w.shape[1 if op is _MM else 0], tuple(scales[0].shape)
        known = shape in ((), (1,), (1, 1), (outputs,), (1, outputs)) and w.dim() == 2
        if known and scales[0].dtype is w.dtype is body.dtype:
            found[after[0]] = number
    return found


def _made(body: RowBody, first: int) -> dict[int, Tensor]:
    """The values that slots alone make, each of slots of zeros."""
    values: dict[int, Any] = {1 + n: torch.zeros(shape, dtype=dtype) for n, (dtype, shape) in enumerate(body.slots)}

    def word(arg: PyObject) -> PyObject:
        if isinstance(arg, Value):
            return values[int(arg)]
        return [word(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

    for number, (op, args, kwargs) in enumerate(body.nodes, first):
        read = _values([args, kwargs])
        if read and all(v in values for v in read) and not _counts(args) and callable(op):
            values[number] = op(*map(word, args), **{k: word(v) for k, v in kwargs.items()})
    return {number: value for number, value in values.items() if isinstance(value, Tensor)}


def _values(arg: PyObject) -> list[int]:
    if isinstance(arg, Value):
        return [int(arg)]
    parts = arg.values() if isinstance(arg, dict) else arg if isinstance(arg, (list, tuple)) else ()
    return [v for part in parts for v in _values(part)]


def _counts(arg: PyObject) -> bool:
    return isinstance(arg, RowCount) or (isinstance(arg, (list, tuple)) and any(map(_counts, arg)))
