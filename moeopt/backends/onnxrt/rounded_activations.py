"""Products of codes whose activations are rounded to int8: faster, and another loss than the weights' own.

    MatMulNBits(x, codes, scales) at accuracy_level 4
      = product of q * s and the weight            s = max |x| of a block / 127      q = round(x / s)

A block is the weight's block of ``block_size`` inputs. The graph is written and verified with float activations first;
only then do its products get level 4. Each kind of them is shown to compute just the line above, on rows of its own
with no number near the middle between two steps, where float32 decides which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeopt.backends.onnxrt.check_bytes import graphs_of
from moeopt.backends.onnxrt.check_quantized import LEVEL, OP
from moeopt.backends.onnxrt.lowerings.quantized import ACCURACY_LEVELS
from moeopt.backends.onnxrt.session import GRAPH, VERIFIED, Session
from moeopt.ops.rounded_rows import STEPS, rounded_rows
from moeopt.value_types import OnnxModel, OnnxNode, PyObject
from moeopt.verification.model import run_plain
from moeopt.verification.rounded import ALLOWED, RoundedKernels, distance_between

KEY = "activations"
"""Of the manifest: "int8" where products of codes round their activations."""
_NEAR = 0.01
"""Of a step: what is so near to the middle between two is moved."""


Comparable = Callable[[Any, Any], Any]
"""An engine and a call -> the call without what no figure is measured on, like a cache."""


class RoundingDeclined(Exception):
    """The products of a graph that was written for rounded activations do not round rightly here; says why."""


def check_rounding(directory: Path) -> RoundedKernels:
    """One product of each kind of a written graph, asked for a single row and for several with rounded activations.

    Raises:
        RoundingDeclined: they compute something else, or there are none.
    """
    import onnx

    proto = onnx.load(directory / GRAPH, load_external_data=False)
    kinds: dict[tuple[int, ...], OnnxNode] = {}
    nodes = list(products(proto))
    for node in nodes:
        values = {a.name: a.i for a in node.attribute}
        kinds.setdefault(tuple(values[name] for name in ("K", "N", "bits", "block_size")), node)
    if not nodes:
        raise RoundingDeclined("the engine has no product that reads codes")
    error = moved = 0.0
    for K, N, bits, block in kinds:
        rounded, floats = (_session(K, N, bits, block, level) for level in (LEVEL, ACCURACY_LEVELS[bits]))
        for rows in (1, 5):
            x = _rows(rows, K, block)
            got, exact = (s.run({"x": x})[0].double() for s in (rounded, floats))
            want = floats.run({"x": rounded_rows(x, block, torch.float64).float()})[0].double()
            length = want.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            here = float(((got - want).norm(dim=-1) / length).max()) / torch.finfo(torch.float32).eps
            moved = max(moved, float(((got - exact).norm(dim=-1) / length).max()))
            error = max(error, here)
            if here > ALLOWED:
                raise RoundingDeclined(
                    f"a product of {K} x {N} in {bits} bits is {here:.3g} eps from what rounding to int8 gives"
                )
    return RoundedKernels(len(nodes), len(kinds), error, moved)


def rounded_engine(
    engine: PyObject, directory: Path, found: RoundedKernels, open_again: Callable[[], PyObject],
    comparable: Comparable, call: PyObject,
) -> tuple[PyObject, dict[str, float]]:  # fmt: skip
    """A verified engine whose products of codes round their activations now, and what a certificate says of that.

    Args:
        directory: of the engine's graph. found: of :func:`check_rounding`.
        open_again: gives the engine of what the graph is then.
    """
    before = run_plain(called_plainly(engine, comparable), *call)
    round_activations(directory)
    rounded = open_again()
    after = run_plain(called_plainly(rounded, comparable), *call)
    return rounded, found.stated(distance_between(before, after))


def called_plainly(engine: PyObject, comparable: Comparable) -> Callable[..., Any]:
    """``engine`` called as the original is."""

    def run(*args: PyObject, **kwargs: PyObject) -> PyObject:
        args, kwargs = comparable(engine, (args, kwargs))
        return engine(*args, **kwargs)

    return run


def round_activations(directory: Path) -> None:
    """Let the products of codes of a written engine round their activations.

    The graph as it was lies beside it then, as ``VERIFIED``.
    """
    import onnx

    (directory / VERIFIED).write_bytes((directory / GRAPH).read_bytes())
    proto = onnx.load(directory / GRAPH, load_external_data=False)
    for node in products(proto):
        _level(node).i = LEVEL
    onnx.save(proto, directory / GRAPH)


def with_float_activations(proto: OnnxModel) -> OnnxModel:
    """A copy of an ``onnx.ModelProto`` whose products of codes read floats."""
    import onnx

    other = onnx.ModelProto()
    other.CopyFrom(proto)
    for node in products(other):
        _level(node).i = ACCURACY_LEVELS[next(a.i for a in node.attribute if a.name == "bits")]
    return other


def products(proto: OnnxModel) -> Iterator[OnnxNode]:
    """The nodes of an ``onnx.ModelProto`` that compute on codes, subgraphs included."""
    yield from (node for graph in graphs_of(proto.graph) for node in graph.node if node.op_type == OP)


def _level(node: OnnxNode) -> PyObject:
    return next(a for a in node.attribute if a.name == "accuracy_level")


def _rows(rows: int, K: int, block: int) -> Tensor:
    """Rows that a kernel may meet: plain, large, small, with one outlier, zero; no number is between two steps."""
    rng = torch.Generator().manual_seed(K + rows)
    x = torch.randn(rows, K, generator=rng)
    if rows > 1:
        x[1], x[2], x[4] = x[1] * 1024, x[2] / 1024, 0
        x[3, K // 2] = 100.0
    wide = torch.nn.functional.pad(x, (0, -K % block)).view(rows, -1, block)
    step = wide.abs().amax(-1, keepdim=True) / STEPS
    off = wide / step - (wide / step).floor() - 0.5
    wide = torch.where((off.abs() < _NEAR) & (step > 0), wide + 4 * _NEAR * step * wide.sign().neg(), wide)
    return wide.view(rows, -1)[:, :K].contiguous()


def _session(K: int, N: int, bits: int, block: int, level: int) -> Session:
    """One product of a kind on codes made up here, at a level."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    draw = np.random.default_rng(K * N + bits)
    N, blocks = min(N, 512), -(-K // block)
    codes = draw.integers(0, 256, (N, blocks, block * bits // 8), dtype=np.uint8)
    scales = draw.uniform(0.01, 0.02, (N, blocks)).astype(np.float32)
    node = helper.make_node(
        OP, ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=K, N=N, bits=bits, block_size=block,
        accuracy_level=level,
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["T", w]) for n, w in (("x", K), ("y", N))]
    held = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], held)
    return Session(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
