"""Where ONNX Runtime's CPU kernels of quantised weights round the activations to int8, unasked.

The error that this makes is as large as that of the weights' own rounding (1e-2 of a row beside 9e-3 to 1.4e-2), so a
node that does it does not compute the quantised model. Run on 1.31.1 and 1.32.0 (MatMulNBits on 1.32.0):

    op            bits  blocks        accuracy level   activations
    MatMulNBits   4     16 and more   0 to 3           float32: what moeopt emits
    MatMulNBits   8     16 and more   0 to 3           float32, by making the whole matrix float at each call: at one
                                                       token 12 to 30 times the time of a float32 product, so moeopt
                                                       emits it where memory was asked for (``mapped=True``)
    MatMulNBits   any   16 and more   4                int8
    QMoE          4     any           0                float32, unless ORT_QMOE_CPU_QNBIT_GEMM=int8 is set
    QMoE          4     16 and more   4                int8
    QMoE          8     none          any              float32
    QMoE          8     16 and more   any              int8, unless ORT_QMOE_CPU_QNBIT_GEMM=fp32
    QMoE          2     32 and more   any              int8

Such a variable of the process would change a QMoE's numbers after an engine was verified, so moeopt emits none for
quantised experts. Mixed bits in one QMoE (fc1 and fc2) are refused when it runs, not when it is loaded.
"""

from __future__ import annotations

from moeopt.value_types import OnnxNode

VARIABLE = "ORT_QMOE_CPU_QNBIT_GEMM"
"""Chooses the product that a QMoE node runs on a CPU."""


def rounds_activations(op: str, bits: int, block: int, level: int) -> str:
    """Why a node of this kind would not compute with the activations that it is given; "" where it does.

    Args:
        op: "MatMulNBits" or "QMoE".
        bits: of a weight.
        block: weights that share a scale; 0 means one scale for each output.
        level: ``accuracy_level``; 0 where it is left out.
    """
    if op == "QMoE" and ((bits == 8 and block) or (bits == 2 and block >= 32)):
        return f"with {bits} bits in blocks its activations are rounded to int8 at every accuracy_level"
    if level == 4 and block:
        return "at accuracy_level 4 its activations are rounded to int8"
    if op == "QMoE" and bits == 4:
        return f"the variable {VARIABLE} of the process changes its numbers after they were verified"
    return ""


def node_problems(node: OnnxNode) -> list[str]:
    """What :func:`rounds_activations` says of an ``onnx_ir`` node of codes."""
    if node.op_type not in ("MatMulNBits", "QMoE"):
        return []
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    bits = int(values.get("bits", values.get("expert_weight_bits", 4)))
    reason = rounds_activations(
        node.op_type, bits, int(values.get("block_size", 0)), int(values.get("accuracy_level", 0))
    )
    return [reason] if reason else []
