"""Names of a graph's parts, made unlike those of any other part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def prefixed(name: str, nodes: Sequence[Any], values: Iterable[Any]) -> None:
    """Begin the names of ``onnx_ir`` nodes, of what they give, and of ``values`` with ``name`` and a slash."""
    for node in nodes:
        node.name = f"{name}/{node.name or node.op_type}"
    for value in (*values, *(v for node in nodes for v in node.outputs)):
        value.name = f"{name}/{value.name}"
