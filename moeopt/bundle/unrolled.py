"""A ``moeopt::row_function`` node as plain calls, so that a bundle holds one flat graph of ops from its list.

    for each expert e:  at = where(ids == e);  y[at] += f(x[at]; slots of e) * w[at]

A graph within a graph would need every check of a bundle a second time (sizes, memory, the list of ops); written out,
each call of an expert is checked as any other. Shape legend: T tokens, K chosen per token, D width of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moeopt.bundle import op_allowlist as allow
from moeopt.bundle.values import encode
from moeopt.ir.row_function import GETITEM, RowCount, RowFunction, Value
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten
ValueName = Callable[[fx.Node], str]


def is_row_function(node: fx.Node) -> bool:
    """Whether ``node`` is a call of the op, which is registered once a block was rewritten."""
    return str(node.target) == "moeopt.row_function.default"


def unrolled(node: fx.Node, name: ValueName) -> list[dict[str, Any]]:
    """The entries of a bundle's graph that compute what ``node`` does; the last has its name.

    Raises:
        BundleError: an op of the function that a bundle may not call.
    """
    x, ids, weights, slots, text = node.args
    spec, call = RowFunction.decode(str(text)), _Calls(node.name, name)
    body, each = spec.body, len(spec.body.slots)
    rows: PyObject = x.meta["val"].dtype  # type: ignore[union-attr]
    top_k = int(ids.meta["val"].shape[1])  # type: ignore[union-attr]
    out = getattr(torch, spec.out_dtype) if spec.out_dtype else rows
    accum = getattr(torch, spec.accum_dtype) if spec.accum_dtype else out
    by_slot = spec.combine == "slot" and top_k > 1
    ids_R, w_R = call(aten.reshape.default, ids, [-1]), call(aten.reshape.default, weights, [-1])
    count = call(aten.sym_size.int, x, 0)
    size = call("operator.mul", count, top_k) if by_slot else count
    y = call(aten.new_zeros.default, x, [size, body.out_features], dtype=accum)
    experts = len(slots) // max(each, 1)  # type: ignore[arg-type]
    for e in range(experts + (spec.out_of_range == "identity")):
        named = call(aten.eq.Scalar if e < experts else aten.ge.Scalar, ids_R, e)
        at = call(aten.reshape.default, call(aten.nonzero.default, named), [-1])
        token = call(aten.div.Tensor_mode, at, top_k, rounding_mode="floor")
        term = call(aten.index_select.default, x, 0, token)
        w = call(aten.unsqueeze.default, call(aten.index_select.default, w_R, 0, at), 1)
        if e == experts or spec.weight_on == "input":
            term = call(aten.mul.Tensor, term, w)
        if e < experts:
            term = call(aten._to_copy.default, term, dtype=body.dtype)
            term = _expert(call, spec, term, slots[e * each : (e + 1) * each])  # type: ignore[index]
            if spec.weight_on == "output":
                term = call(aten.mul.Tensor, term, w)
        term = call(aten._to_copy.default, term, dtype=accum)
        y = call(aten.index_copy.default if by_slot else aten.index_add.default, y, 0, at if by_slot else token, term)
    if by_slot:
        y = call(aten.reshape.default, y, [count, top_k, body.out_features])
        y = call(aten.sum.dim_IntList, y, [1])
    call(aten._to_copy.default, y, dtype=out)
    call.entries[-1]["out"] = node.name
    return call.entries


def _expert(call: _Calls, spec: RowFunction, rows: PyObject, slots: PyObject) -> PyObject:
    """The function's own calls on ``rows``."""
    values = [rows, *slots]

    def word(a: PyObject) -> PyObject:
        if isinstance(a, Value):
            return values[a]
        if isinstance(a, RowCount):
            return call(aten.sym_size.int, rows, 0)
        return [word(v) for v in a] if isinstance(a, (list, tuple)) else a

    for op, args, kwargs in spec.body.nodes:
        values.append(call(op, *map(word, args), **{k: word(v) for k, v in kwargs.items()}))
    return values[spec.body.out]


class _Calls:
    """Collects calls; a result is a reference by name."""

    def __init__(self, prefix: str, name: ValueName) -> None:
        self._prefix, self._name = prefix, name
        self.entries: list[dict[str, Any]] = []

    def __call__(self, op: FxTarget, *args: PyObject, **kwargs: PyObject) -> dict[str, str]:
        known = {GETITEM: "operator.getitem", "operator.mul": "operator.mul"}
        entry: dict[str, Any] = {
            "op": known[op] if isinstance(op, str) else allow.name_of(op),
            "args": [self._word(a) for a in args],
            "out": f"{self._prefix}__{len(self.entries)}",
        }
        if kwargs:
            entry["kwargs"] = {k: self._word(v) for k, v in kwargs.items()}
        self.entries.append(entry)
        return {"node": entry["out"]}

    def _word(self, value: PyObject) -> PyObject:
        if isinstance(value, dict):
            return value
        if isinstance(value, (list, tuple)):
            return [self._word(v) for v in value]
        return encode(value, self._name)
