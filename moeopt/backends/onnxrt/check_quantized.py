"""What a ``MatMulNBits`` node of a bundle may say: what our lowerings of codes write, whose activations stay floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeopt.backends.onnxrt.lowerings.quantized import ACCURACY_LEVELS
from moeopt.value_types import OnnxNode

OP = "MatMulNBits"
LEVEL = 4
"""The accuracy level of a node that rounds its activations to int8."""
_INT = 2
"""How a protobuf attribute says that it is an integer."""
_MAX = 1 << 31


def refuses_node(node: OnnxNode, sizes: Mapping[str, Sequence[int]], rounds: bool = False) -> str:
    """Why ``node`` is none that moeopt writes, a part of a sentence; "" where it is.

    Args:
        sizes: of the graph's constants, by name.
        rounds: whether the bundle says that such nodes round their activations to int8, at level 4.
    """
    values = {a.name: a.i for a in node.attribute if a.type == _INT}
    if len(values) != len(node.attribute) or set(values) != {"K", "N", "bits", "block_size", "accuracy_level"}:
        return f"has attributes other than the {OP} that moeopt writes"
    if rounds and values["bits"] in ACCURACY_LEVELS and values["accuracy_level"] != LEVEL:
        return f"has accuracy level {values['accuracy_level']}, and the bundle says that activations become int8"
    if not rounds and ACCURACY_LEVELS.get(values["bits"]) != values["accuracy_level"]:
        written = " and ".join(f"{bits} bits at level {level}" for bits, level in ACCURACY_LEVELS.items())
        return (
            f"has {values['bits']} bits at accuracy level {values['accuracy_level']}, with which activations may be "
            f"rounded to int8; moeopt writes {written}"
        )
    K, N, block = values["K"], values["N"], values["block_size"]
    if not (0 < K < _MAX and 0 < N < _MAX and 16 <= block <= 1 << 16) or block & (block - 1):
        return f"has the sizes K={K}, N={N} and blocks of {block}"
    if len(node.input) != 3 or len(node.output) != 1:
        return "has other inputs and outputs than it may"
    codes = list(sizes.get(node.input[1], ()))
    told = [N, -(-K // block), block * values["bits"] // 8]
    if codes != told:
        return f"reads codes of the shape {codes}, and its sizes say {told}"
    return ""
