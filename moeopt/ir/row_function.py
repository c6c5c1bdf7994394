"""An expert that fits no ``ExpertsSpec``, as a small graph: one rows input, P parameter slots, ATen calls, one result.

    y_H = sum over the K experts of  f(x_H; slots of expert e) * w          (weight_on == "output")
    y_H = sum over the K experts of  f(x_H * w; slots of expert e)          (weight_on == "input")

``f`` is the same graph for all experts and works on each row by itself. The graph is text, so that it can stand in the
schema of an op and be compared: ``{"in", "slots", "nodes", "out"}``, where a node is ``[op, args, kwargs]`` and an
argument ``{"v": n}`` is value n: 0 the rows (M, H), then the P slots, then the nodes' results. ``{"rows": 1}`` is M.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch

from moeopt.errors import BundleError, UsageError
from moeopt.ir.specs import DTYPE_NAMES
from moeopt.untrusted import parse_json
from moeopt.value_types import PyObject

CODES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of slots whose numbers are codes, from which the function computes weights."""
PLACES = (torch.int64, torch.bool)
"""Dtypes of slots that say which features of a row are read: indices and masks."""
GETITEM = "getitem"
"""The op of a node that takes one of several results."""


class Value(int):
    """Number of a value in a graph: 0 the rows, then the slots, then the results of the nodes."""


class RowCount:
    """Stands for M, the number of rows."""


@dataclass(frozen=True)
class RowBody:
    """A graph that was read.

    Args:
        features, dtype: of the rows (M, features).
        slots: dtype and shape of each.
        nodes: (op, args, kwargs); ``Value``, ``RowCount``, plain values, dtypes and lists of them.
        out: the value that is the result (M, out_features).
    """

    features: int
    dtype: torch.dtype
    slots: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    nodes: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]
    out: int
    out_features: int

    def names(self) -> list[str]:
        """The name of each op once, in order, those that only move values left out."""
        quiet = ("getitem", "view", "reshape", "t", "clone", "_to_copy", "transpose", "permute", "expand", "unsqueeze")
        names = (GETITEM if op == GETITEM else op._schema.name.split("::")[1] for op, _, _ in self.nodes)
        return list(dict.fromkeys(n for n in names if n not in quiet))

    @property
    def tensors(self) -> int:
        """Of how many tensors a row is made, side by side, which the graph takes apart first."""
        parts = 0
        for op, args, _ in self.nodes:  # what an expert itself takes of its row is counted from the right
            if op is not torch.ops.aten.slice.Tensor or args[:2] != (Value(0), 1):
                break
            parts += 1
        return max(parts, 1)

    def products(self) -> int:
        """How many matmuls there are."""
        return sum(map(_is_product, self.nodes))

    def layers(self) -> int:
        """The most matmuls that stand one after another on the way from the rows to the result."""
        depth = [0] * (1 + len(self.slots))
        for node in self.nodes:
            read = [depth[v] for v in _values(node[1]) + _values(list(node[2].values()))]
            depth.append(max(read, default=0) + _is_product(node))
        return depth[self.out]


def _is_product(node: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> bool:
    return node[0] != GETITEM and node[0]._schema.name.split("::")[1] in ("mm", "addmm", "linear", "mv", "bmm")


def _values(parts: Sequence[Any]) -> list[int]:
    """The numbers of the values that a node's arguments name, those in lists among them."""
    found = []
    for part in parts:
        if isinstance(part, Value):
            found.append(int(part))
        elif isinstance(part, (list, tuple)):
            found += _values(part)
    return found


@dataclass(frozen=True)
class RowFunction:
    """The function of a block whose experts are any function of a row; see the module's docstring.

    Args:
        graph: the graph as text.
        compute_dtype: dtype of its result.
        weight_on, out_of_range, combine, accum_dtype, out_dtype: as in ``ExpertsSpec``.
    """

    graph: str
    compute_dtype: str | None = None
    weight_on: Literal["output", "input"] = "output"
    out_of_range: Literal["nothing", "identity"] = "nothing"
    combine: Literal["expert", "slot"] = "slot"
    accum_dtype: str | None = None
    out_dtype: str | None = None
    act_dtype: ClassVar[None] = None  # what the graph rounds, it says itself
    activation: ClassVar[str] = ""

    text = ""
    """:meth:`encode`'s, of each instance; not annotated, so no field: torch.compile reads a plain attribute only."""

    def __post_init__(self) -> None:
        for field in ("compute_dtype", "accum_dtype", "out_dtype"):
            if getattr(self, field) not in DTYPE_NAMES:
                raise UsageError(
                    f"RowFunction.{field} is {getattr(self, field)!r}; it must be None or one of {DTYPE_NAMES[1:]}"
                )
        object.__setattr__(self, "text", self.encode())

    @property
    def body(self) -> RowBody:
        """The graph, read."""
        return read_body(self.graph)

    def encode(self) -> str:
        """A JSON string with every field."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> RowFunction:
        """The inverse of :meth:`encode`; anything else is a ``UsageError``."""
        try:
            spec = cls(**cast("dict[str, Any]", parse_json(text, "the spec")))
            spec.body  # noqa: B018  reads the graph, so that a bad one is told here
        except (BundleError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
            raise UsageError(f"not a RowFunction: {text!r:.200} ({err})") from err
        return spec

    def __str__(self) -> str:
        body = self.body
        words = [f"a function of a row ({', '.join(body.names())}) with {len(body.slots)} weights an expert"]
        if self.weight_on == "input":
            words.append("weight on input")
        if self.out_of_range == "identity":
            words.append("identity beyond E")
        return "; ".join(words)


@functools.lru_cache(maxsize=256)
def read_body(graph: str) -> RowBody:
    """``graph`` with its ops looked up; ``ValueError`` and the like for one that :func:`write_body` did not write."""
    data = cast("dict[str, Any]", parse_json(graph, "the graph of a row function"))
    features, dtype, out_features = data["in"]
    slots = tuple((_dtype(d), tuple(shape)) for d, shape in data["slots"])
    nodes: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for op, args, kwargs in data["nodes"]:
        target = GETITEM if op == GETITEM else _op(op)
        node = target, tuple(_read(a) for a in args), {k: _read(v) for k, v in kwargs.items()}
        _check_known(_values([node[1], list(node[2].values())]), 1 + len(slots) + len(nodes))
        nodes.append(node)
    _check_known([data["out"]], 1 + len(slots) + len(nodes))
    if any(type(size) is not int or size < 1 for size in (features, out_features)):
        raise ValueError(f"rows of {features} and of {out_features} features")
    return RowBody(features, _dtype(dtype), slots, tuple(nodes), data["out"], out_features)


def _check_known(values: Sequence[int], count: int) -> None:
    for value in values:
        if not 0 <= value < count:
            raise ValueError(f"value {value} of {count}")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found


def write_body(
    features: int, dtype: torch.dtype, slots: list[tuple[torch.dtype, tuple[int, ...]]],
    nodes: list[tuple[Any, tuple[Any, ...], dict[str, Any]]], out: int, out_features: int,
) -> str:  # fmt: skip
    """The inverse of :func:`read_body`, from its parts."""
    data = {
        "in": [features, _short(dtype), out_features],
        "slots": [[_short(d), list(shape)] for d, shape in slots],
        "nodes": [
            [op if op == GETITEM else str(op), [_write(a) for a in args], {k: _write(v) for k, v in kwargs.items()}]
            for op, args, kwargs in nodes
        ],
        "out": out,
    }
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _op(name: str) -> PyObject:
    space, packet, overload = name.split(".")
    if space != "aten":
        raise ValueError(f"{name} is no ATen op")
    op = getattr(getattr(torch.ops.aten, packet), overload)
    if op._schema.is_mutable:
        raise ValueError(f"{name} writes to its arguments")
    return op


def _read(word: PyObject) -> PyObject:
    if isinstance(word, list):
        return [_read(w) for w in word]
    if isinstance(word, dict):
        ((kind, value),) = word.items()
        if kind == "v":
            return Value(value)
        if kind == "rows":
            return RowCount()
        return float(value) if kind == "float" else _dtype(value)
    return word


def _write(value: PyObject) -> PyObject:
    if isinstance(value, Value):
        return {"v": int(value)}
    if isinstance(value, RowCount):
        return {"rows": 1}
    if isinstance(value, (list, tuple)):
        return [_write(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": _short(value)}
    if isinstance(value, float) and value - value != 0:
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} is no argument of a row function")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
