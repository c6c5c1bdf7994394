"""What a ``MatMulNBits`` node of a bundle may say: what our lowerings of codes write, whose activations stay floats.

The bundle of an ONNX file also holds nodes that were in the file. They are kept as they were, so that only their sizes
are checked: a kernel reads as many codes as a node's attributes say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moeopt.backends.onnxrt.lowerings.quantized import ACCURACY_LEVELS
from moeopt.value_types import OnnxNode

OP = "MatMulNBits"
LEVEL = 4
"""The accuracy level of a node that rounds its activations to int8."""
_INT = 2
"""How a protobuf attribute says that it is an integer."""
_MAX = 1 << 31


def refuses_node(
    node: OnnxNode, sizes: Mapping[str, Sequence[int]], rounds: bool = False, *, given: bool = False
) -> str:
    """Why ``node`` is none that moeopt writes, a part of a sentence; "" where it is.

    Args:
        sizes: of the graph's constants, by name.
        rounds: whether the bundle says that such nodes round their activations to int8, at level 4.
        given: whether the bundle is one of a file, which may have held the node.
    """
    values = {a.name: a.i for a in node.attribute if a.type == _INT}
    if given:
        values = {"K": 0, "N": 0, "bits": 4, "block_size": 0, "accuracy_level": 0} | values
    elif len(values) != len(node.attribute) or set(values) != {"K", "N", "bits", "block_size", "accuracy_level"}:
        return f"has attributes other than the {OP} that moeopt writes"
    if not given and (reason := _refuses_level(values["bits"], values["accuracy_level"], rounds)):
        return reason
    return _refuses_sizes(node, values, sizes, given)


def _refuses_level(bits: int, level: int, rounds: bool) -> str:
    if rounds and bits in ACCURACY_LEVELS and level != LEVEL:
        return f"has accuracy level {level}, and the bundle says that activations become int8"
    if rounds or ACCURACY_LEVELS.get(bits) == level:
        return ""
    written = " and ".join(f"{bits} bits at level {level}" for bits, level in ACCURACY_LEVELS.items())
    return (
        f"has {bits} bits at accuracy level {level}, with which activations may be rounded to int8; moeopt writes "
        f"{written}"
    )


def _refuses_sizes(node: OnnxNode, values: Mapping[str, int], sizes: Mapping[str, Sequence[int]], given: bool) -> str:
    K, N, block = values["K"], values["N"], values["block_size"]
    if not (0 < K < _MAX and 0 < N < _MAX and 16 <= block <= 1 << 16) or block & (block - 1):
        return f"has the sizes K={K}, N={N} and blocks of {block}"
    blocks = -(-K // block)
    zeros = len(node.input) == 4 and node.input[3] in sizes
    if not given and (len(node.input) != 3 + zeros or len(node.output) != 1):
        return "has other inputs and outputs than it may"
    told = {1: ("codes", [N, blocks, block * values["bits"] // 8])}
    if zeros and not given:
        told[3] = ("zero points", [N, -(-blocks * values["bits"] // 8)])
    for number, (what, shape) in told.items():
        if (found := list(sizes.get(node.input[number], ()))) != shape and not (
            given and math.prod(found) == math.prod(shape)
        ):
            return f"reads {what} of the shape {found}, and its sizes say {shape}"
    return ""
