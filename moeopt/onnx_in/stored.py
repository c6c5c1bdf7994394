"""Tensors that lie in a protobuf graph itself: where they are, and whether there are as many numbers as shapes say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from moeopt.errors import UsageError
from moeopt.onnx_in.order import bodies
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxNode, OnnxValue

_FIELDS = {"FLOAT": "float_data", "COMPLEX64": "float_data", "DOUBLE": "double_data", "COMPLEX128": "double_data"} | {
    "INT64": "int64_data", "UINT32": "uint64_data", "UINT64": "uint64_data", "STRING": "string_data",
}  # fmt: skip
"""Where numbers of an element type are listed; those of others in ``int32_data``."""


def tensors_in(nodes: Iterable[OnnxNode]) -> Iterator[Any]:
    """The tensors that nodes hold as attributes; and those of the bodies in them, their initializers included."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for body in bodies(node):
            yield from body.initializer
            yield from tensors_in(body.node)


def sparse_in(nodes: Iterable[OnnxNode]) -> Iterator[str]:
    """The names of the nodes that hold sparse tensors, and of such weights of the bodies in them."""
    for node in nodes:
        if any(a.HasField("sparse_tensor") or a.sparse_tensors for a in node.attribute):
            yield node.name
        for body in bodies(node):
            yield from (tensor.values.name for tensor in body.sparse_initializer)
            yield from sparse_in(body.node)


def check_listed(where: str, tensor: OnnxValue, kind: str, bits: int | None) -> None:
    """``UsageError`` where a tensor lists its numbers one by one, and they are not as many as its shape says.

    Args:
        kind: the name of its element type. bits: of one element; several of less than 8 lie in one number.
    """
    count = math.prod(tensor.dims)
    want = -(-count * bits // 8) if bits is not None and bits < 8 else count * (2 if "COMPLEX" in kind else 1)
    found = len(getattr(tensor, _FIELDS.get(kind, "int32_data")))
    if found != want:
        raise UsageError(
            f"{where}: the weight {shown_line(tensor.name)!r} has {found} numbers of the element type {kind}, and its "
            f"shape says {want}: it was damaged or cut off"
        )
