"""Lowerings: each replaces the grouped-expert op by nodes that ONNX Runtime runs; the order here breaks ties."""

from moeopt.backends.onnxrt.lowerings.moe_kernel import Expand, MaskedLog
from moeopt.backends.onnxrt.lowerings.quantized import ROUNDED_BLOCK, UnrolledBytes, UnrolledCodes, UnrolledFloats
from moeopt.backends.onnxrt.lowerings.unrolled import Unrolled
from moeopt.backends.onnxrt.lowerings.unrolled_function import UnrolledFunction
from moeopt.errors import UsageError
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.lowerings.dense import Dense
from moeopt.lower.onnx.lowerings.dense_function import DenseFunction

LOWERINGS: tuple[Lowering, ...] = (Unrolled(), MaskedLog(), Expand(), Dense())
QUANTIZED_LOWERINGS: tuple[Lowering, ...] = (UnrolledCodes(), UnrolledFloats())
"""Those of experts that are codes and scales."""
MAPPED_LOWERINGS: tuple[Lowering, ...] = (UnrolledCodes(), UnrolledBytes())
"""Those of them with which a session holds the codes as they lie in the file; ``mapped=True`` takes them first."""
ROUNDED_LOWERINGS: tuple[Lowering, ...] = (UnrolledCodes(), UnrolledBytes(widest=ROUNDED_BLOCK))
"""Those with which a product may round its activations to int8."""
FUNCTION_LOWERINGS: tuple[Lowering, ...] = (UnrolledFunction(), DenseFunction())
"""Those of experts that are a function of a row."""
NOT_PORTABLE = {
    **dict.fromkeys(
        (MaskedLog.name, Expand.name, *(low.name for low in MAPPED_LOWERINGS)), "its operator is of ONNX Runtime's own"
    ),
    Dense.name: "OpenVINO 2026.4 does not compile a product with a constant stack of matrices",
}
"""Lowering -> why a portable engine leaves the lowering out."""


def by_name(name: str) -> Lowering:
    """The lowering called ``name``; a ``UsageError`` that lists the names if there is none."""
    for lowering in (*LOWERINGS, *QUANTIZED_LOWERINGS, *MAPPED_LOWERINGS, *FUNCTION_LOWERINGS):
        if lowering.name == name:
            return lowering
    names = ", ".join(lowering.name for lowering in LOWERINGS)
    raise UsageError(f"no lowering is called {name!r}; the lowerings are {names}")
