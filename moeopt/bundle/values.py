"""The literals of a graph as JSON, and back: what is not JSON already becomes a one-key object."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from moeopt.errors import BundleError
from moeopt.value_types import JsonValue, PyObject

LAYOUTS = {"strided": torch.strided}
MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)
}
MAX_NUMEL = 1 << 40
"""No tensor that fits a machine has more elements; a literal size beyond it is refused before it is tried."""


def encode(value: PyObject, node: Callable[[Any], Any] | None = None) -> PyObject:
    """``value`` as JSON; ``node`` turns a graph node into its name. ``TypeError`` names what has no JSON form."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (list, tuple)):
        return [encode(v, node) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, table in (("layout", LAYOUTS), ("memory_format", MEMORY_FORMATS)):
        for name, known in table.items():
            if type(value) is type(known) and value == known:
                return {key: name}
    if node is not None and isinstance(value, torch.fx.Node):
        return {"node": node(value)}
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} ({value!r:.60}) has no JSON form")


def decode(data: JsonValue, node: Callable[[str], Any], device: Callable[[str], torch.device]) -> PyObject:
    """The inverse of :func:`encode`; ``BundleError`` for anything that it would not have written."""
    if data is None or isinstance(data, (bool, str, float)):
        return data
    if isinstance(data, int):
        if abs(data) > (1 << 64):  # bounds of sizes reach beyond 63 bits
            raise BundleError(f"the integer {data} does not fit 64 bits")
        return data
    if isinstance(data, list):
        _check_size(data)
        return [decode(v, node, device) for v in data]
    if isinstance(data, dict) and len(data) == 1:
        ((kind, value),) = data.items()
        tables: dict[str, dict[str, Any]] = {"dtype": DTYPES, "layout": LAYOUTS, "memory_format": MEMORY_FORMATS}
        if kind in tables and isinstance(value, str) and value in tables[kind]:
            return tables[kind][value]
        if kind == "node" and isinstance(value, str):
            return node(value)
        if kind == "device" and isinstance(value, str):
            return device(value)
        if kind == "float" and isinstance(value, str) and value in ("inf", "-inf", "nan"):
            return float(value)
        if kind == "complex" and isinstance(value, list) and [type(v) in (int, float) for v in value] == [True, True]:
            return complex(*value)
    raise BundleError(f"{str(data)[:80]!r} is not a literal that moeopt writes")


def _check_size(values: list[Any]) -> None:
    sizes = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 < v < (1 << 62)]
    if len(sizes) == len(values) and values and math.prod(sizes) > MAX_NUMEL:
        raise BundleError(f"the sizes {str(values)[:60]} ask for {math.prod(sizes):.1e} elements")
