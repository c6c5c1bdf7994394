"""What a runtime's kernels give, measured against float64 over the whole range of float32.

    accurate    every result of 2^-120 and more is within 8 times PyTorch's own float32 error nearby, or 16 units of
                2^-24
    nan, inf    a NaN, an infinity and what overflows give what they give in PyTorch
    denormal    denormal numbers and results are kept, not taken for 0
    shapes      no element gives none, and one alone what it gives among many

``accuracy.json`` holds the result for each provider and version that was measured (``benchmarks/onnx_accuracy.py``
writes it; a test holds the installed version to it). A kernel that is not right there has another form in every graph
that is written: :data:`moeopt.lower.onnx.accurate.FORMS` or :data:`REPLACED` names it; :func:`coarse` finds the rest.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeopt.backends.onnxrt.accuracy_kernels import KERNELS, ROW, Kernel
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import Session
from moeopt.value_types import PyObject

EPS, DENORMAL = 2.0**-24, 2.0**-149
LEAST = 2.0**-120
CLASSES = ("accurate", "nan", "inf", "shapes")
"""What must be the same on every machine; "denormal" depends on its vector instructions."""
_NEAR = 32

REPLACED = {
    "ReduceMax": "a NaN stays one through IsNaN, in moeopt.lower.onnx.translate",
    "ReduceMin": "alike",
    "ArgMax": "of values whose NaN are +inf, in moeopt.lower.onnx.translate",
    "ArgMin": "alike",
    "ReduceSum(int64)": "two halves, in moeopt.lower.onnx.translate_numbers",
    "ReduceProd(int64)": "written out, in moeopt.lower.onnx.translate_numbers",
    "Pow": "square roots, in moeopt.lower.onnx.translate_numbers",
    "Shrink": "no exporter writes it: hardshrink is a Where",
    "TopK": "nothing: versions before 1.32 pass over NaN, which version_notes says",
    "LayerNormalization": "nothing: rows beyond 1e19 overflow, and are 0 where PyTorch gives NaN (docs/limits.md)",
}
"""Operators that are not right and not in ``FORMS``: what is done about each."""


def measure(provider: str = "cpu") -> dict[str, dict[str, Any]]:
    """Every kernel of :data:`KERNELS` on ``provider``, by name: the fields of the module's docstring, and "worst" and
    "breaks": the error in units of 2^-24 and the least and largest input where it is not accurate.

    A kernel that the provider lacks is left out.

    Raises:
        UsageError: the provider is not on this machine.
    """
    found = {}
    for kernel in KERNELS:
        try:
            session = Session(_model(kernel), provider)
        except Exception as err:
            if "NOT_IMPLEMENTED" not in str(err) and "not a registered function" not in str(err):
                raise
            continue
        found[kernel.name] = _integers(session, kernel) if kernel.over == "integers" else _floats(session, kernel)
    return found


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """``accuracy.json``: kernels by provider and version, as :func:`measure` gives them; read once, and not changed."""
    text = importlib.resources.files("moeopt.backends.onnxrt").joinpath("accuracy.json").read_text()
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(text)
    return found


def version() -> str:
    """The installed runtime's version, to its minor number: "1.32"."""
    return ".".join(runtime().__version__.split(".")[:2])


def right(row: dict[str, Any]) -> bool:
    """Whether a row of the table says that a kernel is right in every class."""
    return all(row[name] for name in CLASSES)


def coarse(model: PyObject, provider: str) -> list[str]:
    """The nodes of an ``onnx_ir`` model whose kernels lose digits on ``provider``, each with the fact; [] when none.

    A provider that was not measured has none.
    """
    versions = table().get(provider, {})
    rows = versions.get(version()) or (list(versions.values())[-1] if versions else {})
    wrong = {name: row for name, row in rows.items() if not row["accurate"] and name not in REPLACED}
    found = []
    for node in model.graph.all_nodes():
        row = wrong.get(node.op_type)
        if row is not None and not (node.inputs and node.inputs[0] is not None and _integral(node.inputs[0])):
            low, high = row["breaks"]
            found.append(f"{node.name or node.op_type}: {node.op_type} is not accurate between {low:g} and {high:g}")
    return found


def version_notes(provider: str) -> list[str]:
    """What the owner of an engine on ``provider`` shall know of the installed version; [] of one that is right."""
    row = table().get(provider, {}).get(version(), {}).get("TopK")
    if row is None or row["nan"]:
        return []
    return [
        f"ONNX Runtime {version()} passes over scores of a router that are NaN; 1.32 and newer choose these experts "
        "first, as a model does"
    ]


def _integral(value: PyObject) -> bool:
    return value.dtype is not None and not value.dtype.is_floating_point()


def _model(kernel: Kernel) -> bytes:
    import onnx_ir as ir

    dtype = ir.DataType.INT64 if kernel.over == "integers" else ir.DataType.FLOAT
    shape = ir.Shape(["N"] if kernel.over == "points" else ["N", ROW])
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=shape)
    operands = []
    for number, array in enumerate(kernel.operands):
        tensor = ir.tensor(np.asarray(array))
        operands.append(ir.Value(name=f"c{number}", type=ir.TensorType(tensor.dtype), const_value=tensor))
    inputs = [x, *operands]
    node = ir.node(kernel.op, inputs, kernel.attributes, domain=kernel.domain, num_outputs=kernel.outputs)
    y = node.outputs[0]
    integral = kernel.over == "integers" or kernel.op in ("ArgMax", "ArgMin")
    y.name, y.type = "y", ir.TensorType(ir.DataType.INT64 if integral else ir.DataType.FLOAT)
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=operands, opset_imports=opsets, name="kernel")
    return bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def points() -> Tensor:
    """Numbers of every magnitude and sign of float32, in order; most of them where activations bend."""
    powers = np.exp2(np.arange(-149, 128))[:, None] * np.array([1.0, 1.1, 1.37, 1.5, 1.83, 1.99])
    bends = np.concatenate([np.linspace(-110, 110, 20001), np.linspace(-4, 4, 4001)])
    return torch.from_numpy(np.unique(np.concatenate([powers.ravel(), -powers.ravel(), bends]).astype(np.float32)))


def rows() -> Tensor:
    """(N, 8): normal rows of many scales, equal ones, zeros, one large number among small ones."""
    generator = torch.Generator().manual_seed(0)
    scales = [1e-38, 1e-30, 1e-18, 1e-6, 1.0, 30.0, 300.0, 1e6, 1e10, 1e18]
    normal = torch.cat([torch.randn(16, ROW, generator=generator) * s for s in scales])
    special = torch.randn(4, ROW, generator=generator) * 1e-3
    special[0], special[1] = 0, special[1, 0]
    special[2, 3], special[3, 5] = 1e10, -1e10
    return torch.cat([normal, special, normal[64:80] + 100])


def _special(over: str) -> Tensor:
    inf, nan, huge = float("inf"), float("nan"), 3.4e38
    if over == "points":
        return torch.tensor([0.0, inf, -inf, nan, huge, -huge])
    found = torch.randn(9, ROW, generator=torch.Generator().manual_seed(1))
    found[0, 0], found[1, 5], found[2] = nan, nan, nan
    found[3, 3], found[4, 2] = inf, -inf
    found[5, 1], found[5, 6] = inf, -inf
    found[6] *= 1e25
    found[7], found[8] = inf, -inf
    return found


def _run(session: Session, x: Tensor) -> Tensor:
    return session.run({"x": x})[0].double()


def _floats(session: Session, kernel: Kernel) -> dict[str, Any]:
    x = points() if kernel.over == "points" else rows()
    got, want, ours = _run(session, x), kernel.function(x.double()).double(), kernel.function(x).double()
    scale = x.double().abs().sum(-1) if kernel.sums else want.abs()
    scale = scale if scale.shape == want.shape else scale[:, None].expand(want.shape)
    error, allowed = (got - want).abs(), (ours - want).abs().nan_to_num(nan=float("inf"))
    normal = (want.abs() >= LEAST) & (want.abs() < 3.4e38) & want.isfinite()
    if kernel.over == "points":
        normal &= x.abs() >= 2.0**-126
        allowed = torch.nn.functional.max_pool1d(allowed[None], 2 * _NEAR + 1, 1, _NEAR)[0]
    elif allowed.dim() == 2:
        allowed = allowed.amax(-1, keepdim=True).expand(allowed.shape)
    bad = normal & ~(error <= torch.maximum(16 * EPS * scale, 8 * allowed)) & (got != ours)
    low = ~normal & want.isfinite() & (want.abs() < 3.4e38)
    lost = low & ((got - ours).abs() > 256 * DENORMAL) & (error > 16 * EPS * scale)
    row: dict[str, Any] = {"accurate": not bool(bad.any()), "denormal": not bool(lost.any())}
    row["worst"] = _short(float((error / want.abs())[normal].nan_to_num(posinf=1e9).max()) / EPS)
    if bool(bad.any()):
        where = x[bad] if kernel.over == "points" else x[bad if bad.dim() == 1 else bad.any(-1)].abs()
        row["breaks"] = [_short(float(where.min())), _short(float(where.max()))]
    return row | _specials(session, kernel)


def _specials(session: Session, kernel: Kernel) -> dict[str, Any]:
    x = _special(kernel.over)
    got, ours = _run(session, x), kernel.function(x).double()
    near = (got - ours).abs() <= 1e-5 * ours.abs() + LEAST
    want = kernel.function(x.double()).float().double()  # PyTorch's own gelu of infinity depends on the vector width
    same = (got == ours) | (got.isnan() & ours.isnan()) | near | (got == want)
    same = same if same.dim() == 1 else same.all(-1)
    nan = x.isnan() if x.dim() == 1 else x.isnan().any(-1)
    alone = torch.cat([_run(session, x[n : n + 1]) for n in range(len(x))])
    shapes = bool(torch.equal(alone.nan_to_num(7e7), got.nan_to_num(7e7))) and len(_run(session, x[:0])) == 0
    return {"nan": bool(same[nan].all()), "inf": bool(same[~nan].all()), "shapes": shapes}


def _integers(session: Session, kernel: Kernel) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randint(-(2**bits), 2**bits, (16, ROW), generator=generator) for bits in (4, 7, 25, 54, 60)])
    got, want = session.run({"x": x})[0], kernel.function(x)
    return {"accurate": bool(torch.equal(got, want)), "nan": True, "inf": True, "shapes": True, "denormal": True}


def _short(number: float) -> float:
    return float(f"{number:.2g}")
