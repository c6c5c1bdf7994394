"""Products of codes whose activations are rounded to int8: faster, and another loss than the weights' own.

    MatMulNBits(x, codes, scales) at accuracy_level 4
      = product of q * s and the weight            s = max |x| of a block / 127      q = round(x / s)

A block is the weight's block of ``block_size`` inputs; moeopt's own operator, in the graph that has it, rounds in
blocks of 32. Graphs are written and verified with float activations first; only then are their products let round.
Each kind of them is shown to compute just the line above, on rows of its own with no number near the middle between
two steps, where float32 decides which it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeopt.backends.onnxrt.check_quantized import LEVEL, OP
from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.lowerings.native import Native
from moeopt.backends.onnxrt.lowerings.quantized import ACCURACY_LEVELS, UnrolledBytes, UnrolledCodes
from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.onnxrt.rounded_nodes import count_of, products, set_rounding
from moeopt.backends.onnxrt.session import GRAPH, NATIVE, VERIFIED, VERIFIED_NATIVE, Session
from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import WeightFormat
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops.native.rounded_check import error_of
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.ops.rounded_rows import STEPS, rounded_rows
from moeopt.value_types import OnnxModel, OnnxNode, PyObject
from moeopt.verification.model import run_plain
from moeopt.verification.rounded import ALLOWED, RoundedKernels, distance_between

KEY = "activations"
"""Of the manifest: "int8" where products of codes round their activations."""
_NEAR = 0.01
"""Of a step: what is so near to the middle between two is moved."""
_CODES, _STORED = {4: "uint4", 8: "uint8"}, {4: UnrolledCodes.name, 8: UnrolledBytes.name}
"""By the bits of a code: what codes beside rows of 8 bits are, and the lowering that stores them."""
_SCALES = {1: "float32", 10: "float16", 16: "bfloat16"}
"""Of scales, by ONNX's number of a dtype."""

Comparable = Callable[[Any, Any], Any]
"""An engine and a call -> the call without what no figure is measured on, like a cache."""


class RoundingDeclined(Exception):
    """The products of a graph that was written for rounded activations do not round rightly here; says why."""


def check_rounding(directory: Path) -> RoundedKernels:
    """One product of each kind of a written graph, asked for a single row and for several with rounded activations.

    So are moeopt's own nodes of codes in the graph that stands beside it, if one does.

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
    native = check_operator(directory)
    error, moved = max([error, *(here for here, _ in native)]), max([moved, *(by for _, by in native)])
    return RoundedKernels(len(nodes), len(kinds) + len(native), error, moved)


def check_operator(directory: Path) -> list[tuple[float, float]]:
    """Each kind of moeopt's own nodes of codes in a written graph, on this machine: what ``error_of`` says.

    Raises:
        RoundingDeclined: they compute something else.
    """
    found = []
    for format in _native_kinds(directory):
        found.append(error_of(_ask_operator, format))
        if found[-1][0] > ALLOWED:
            raise RoundingDeclined(
                f"moeopt's operator on experts of {_sizes(format)} is {found[-1][0]:.3g} eps from what rounding to "
                "int8 gives"
            )
    return found


def _native_kinds(directory: Path) -> list[BankFormat]:
    """Those of the nodes of moeopt's operator that read codes, in the graph beside ``GRAPH``."""
    import onnx

    if not (directory / NATIVE).is_file():
        return []
    proto = onnx.load(directory / NATIVE, load_external_data=False)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    return list(dict.fromkeys(_format(node, held) for node in products(proto) if node.op_type != OP))


def _format(node: OnnxNode, held: Mapping[str, OnnxModel]) -> BankFormat:
    """Of one expert of such a node. ``held``: the graph's constants, by name."""
    values = {a.name: a for a in node.attribute}
    parts, E = 2 if values["rows"].s == b"separate" else 1, int(values["experts"].i)

    def matrix(at: int, columns: int) -> MatrixFormat:
        codes, scales = (held[name] for name in node.input[3 + 2 * at : 5 + 2 * at])
        format = WeightFormat(
            "codes", _CODES[values["codes"].i], (1, int(values["block"].i) or None), _SCALES[scales.data_type]
        )
        return MatrixFormat(format, (int(codes.dims[0]), columns), False)

    w_in = tuple(matrix(part, int(values["hidden"].i)) for part in range(parts))
    return BankFormat(1, w_in, matrix(parts * E, int(values["inner"].i)))


def _sizes(format: BankFormat) -> str:
    return " and ".join(" x ".join(str(n) for n in reversed(m.shape)) for m in (*format.w_in, format.w_out))


def _ask_operator(x: Tensor, ids: Tensor, weights: Tensor, bank: QuantizedExpertWeights, spec: ExpertsSpec) -> Tensor:
    site = ExpertsNode("block", bank, spec, torch.float32, ids.shape[1], torch.float32)
    stored = by_name(_STORED[bank.format.w_out.format.bits])
    session = session_of(site, Native(stored), rounds=True)
    return session.run({"x": x, "ids": ids, "weights": weights})[0]


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
    found = dataclasses.replace(found, products=_multiplied(directory / rounded.graph))
    return rounded, found.stated(distance_between(before, after))


def called_plainly(engine: PyObject, comparable: Comparable) -> Callable[..., Any]:
    """``engine`` called as the original is."""

    def run(*args: PyObject, **kwargs: PyObject) -> PyObject:
        args, kwargs = comparable(engine, (args, kwargs))
        return engine(*args, **kwargs)

    return run


def round_activations(directory: Path) -> None:
    """Let the products of codes of a written engine round their activations.

    The graphs as they were lie beside them then, as ``VERIFIED`` and ``VERIFIED_NATIVE``.
    """
    import onnx

    for graph, before in ((GRAPH, VERIFIED), (NATIVE, VERIFIED_NATIVE)):
        if not (directory / graph).is_file():
            continue
        (directory / before).write_bytes((directory / graph).read_bytes())
        proto = onnx.load(directory / graph, load_external_data=False)
        for node in products(proto):
            set_rounding(node, True)
        onnx.save(proto, directory / graph)


def _multiplied(graph: Path) -> int:
    """How many matrices of codes a written graph multiplies with."""
    import onnx

    return sum(count_of(node) for node in products(onnx.load(graph, load_external_data=False)))


def with_float_activations(proto: OnnxModel) -> OnnxModel:
    """A copy of an ``onnx.ModelProto`` whose products of codes read floats."""
    import onnx

    other = onnx.ModelProto()
    other.CopyFrom(proto)
    for node in products(other):
        set_rounding(node, False)
    return other


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
