"""Variables of the process that change what ONNX Runtime's kernels compute, as a bundle remembers them.

    op      variables
    QMoE    ORT_QMOE_CPU_QNBIT_GEMM (which product: float32 or int8 activations), ORT_QMOE_* (which chosen experts are
            left out), ORT_USE_MLAS_Q4_GEMM_MOE

Their names are those that the libraries of ONNX Runtime 1.31 and 1.32 ask for. moeopt emits no QMoE; files that it is
given hold some. Such an engine was verified under the variables of one process, and computes something else under
others: it is not loaded there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moeopt.backends.onnxrt.check_bytes import graphs_of
from moeopt.errors import UsageError
from moeopt.options import variables_beginning
from moeopt.value_types import OnnxModel

PREFIXES = {"QMoE": ("ORT_QMOE_", "ORT_USE_MLAS_Q4_GEMM_MOE")}
"""By operator, how the names of the variables begin that change its numbers."""
KEY = "variables"
"""Of the manifest: by name, the variables that were set when the engine was verified."""


def variables(ops: Iterable[str]) -> dict[str, str]:
    """The variables set in this process that change the numbers of nodes of these operators."""
    begins = tuple(prefix for op in {*ops} & {*PREFIXES} for prefix in PREFIXES[op])
    return variables_beginning(begins)


def operators_of(proto: OnnxModel) -> list[str]:
    """The operators of an ``onnx.ModelProto``, subgraphs included."""
    return [node.op_type for graph in graphs_of(proto.graph) for node in graph.node]


def variables_note(found: Mapping[str, str]) -> list[str]:
    """A sentence for report and certificate where such variables are set; none else."""
    if not found:
        return []
    words = ", ".join(f"{name}={value}" for name, value in found.items())
    return [f"verified with {words} set in the process, which changes this engine's numbers: it runs nowhere else"]


def check_variables_of(directory: Path, data: Mapping[str, Any], proto: OnnxModel) -> None:
    """Refuse an engine whose numbers the variables of this process change.

    Args:
        directory: the bundle. data: its manifest. proto: its graph.

    Raises:
        UsageError: a variable differs; the message names it, both values, and the way out.
    """
    held = data.get(KEY)
    check_variables({str(k): str(v) for k, v in held.items()} if isinstance(held, dict) else {}, proto, str(directory))


def check_variables(then: Mapping[str, str], proto: OnnxModel, name_of: str) -> None:
    """The same for an engine that was verified with the variables ``then``; messages call it ``name_of``."""
    now = variables(operators_of(proto))
    for name in sorted({*then, *now}):
        if then.get(name) == now.get(name):
            continue
        was = f"set to {then[name]!r:.60}" if name in then else "not set"
        here = f"it is {now[name]!r:.60}" if name in now else "it is not set"
        way = f"start the process with {name}={then[name]:.60}" if name in then else f"unset {name} before it starts"
        raise UsageError(
            f"{name_of}: the engine was verified with the variable {name} {was}, and in this process {here}: its "
            f"QMoE nodes compute other numbers then. For this engine {way}, or optimise the model again in this "
            "process"
        )
