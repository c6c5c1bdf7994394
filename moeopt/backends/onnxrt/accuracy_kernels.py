"""The operators that an engine's graph can hold, each with the PyTorch function that it stands for.

:mod:`~.accuracy` measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.value_types import PyObject

ROW = 8
"""Elements of a row of what reductions are measured on."""


@dataclass(frozen=True)
class Kernel:
    """One operator with attributes.

    Args:
        op: its type; ``domain`` "" is ONNX's own.
        function: what it computes, in PyTorch, of tensors of any float dtype.
        attributes: of the node.
        operands: further inputs of the node, as constants in float32, or int64 for integers.
        over: "points", "rows" of (N, 8), or "integers" rows.
        label: its name in the table; the op's where that is enough.
        sums: its rounding is relative to the sum of all magnitudes.
    """

    op: str
    function: Callable[[Tensor], Tensor]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    operands: tuple[Any, ...] = ()
    over: str = "points"
    domain: str = ""
    label: str = ""
    outputs: int = 1
    sums: bool = False

    @property
    def name(self) -> str:
        return self.label or self.op


def _rows(
    op: str, function: Callable[[Tensor], Tensor], *axes: PyObject, over: str = "rows", **attributes: PyObject
) -> Kernel:
    label = f"{op}(int64)" if over == "integers" else ""
    sums = op in ("ReduceSum", "ReduceMean", "CumSum")
    return Kernel(op, function, attributes, axes, over, label=label, sums=sums)


_ONE, _MS = np.ones(ROW, np.float32), "com.microsoft"
_LAST = np.array([-1])
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acosh": torch.acosh, "Acos": torch.acos, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Celu": F.celu, "Cos": torch.cos,
    "Cosh": torch.cosh, "Elu": F.elu, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Gelu": F.gelu,
    "HardSwish": F.hardswish, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Relu": F.relu,
    "Reciprocal": torch.reciprocal, "Round": torch.round, "Selu": F.selu, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
    "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt,
    "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
KERNELS = (
    *(Kernel(op, function) for op, function in _PLAIN.items()),
    Kernel("HardSigmoid", F.hardsigmoid, {"alpha": 1 / 6, "beta": 0.5}),
    Kernel("LeakyRelu", F.leaky_relu, {"alpha": 0.01}),
    Kernel("ThresholdedRelu", lambda x: torch.where(x > 1, x, 0 * x.nan_to_num(0, 0, 0)), {"alpha": 1.0}),
    Kernel("Shrink", lambda x: F.hardshrink(x, 0.5), {"lambd": 0.5}),
    Kernel("Gelu", lambda x: F.gelu(x, approximate="tanh"), {"approximate": "tanh"}, label="Gelu(tanh)"),
    Kernel("QuickGelu", F.silu, {"alpha": 1.0}, domain=_MS),
    Kernel("FastGelu", lambda x: F.gelu(x, approximate="tanh"), domain=_MS),
    Kernel("Clip", lambda x: x.clamp(-3, 3), operands=(np.float32(-3), np.float32(3)), label="Clip(both)"),
    Kernel("Clip", lambda x: x.clamp(min=1), operands=(np.float32(1),)),
    Kernel("Max", lambda x: torch.maximum(x, x.new_tensor(1)), operands=(np.float32(1),)),
    Kernel("Min", lambda x: torch.minimum(x, x.new_tensor(1)), operands=(np.float32(1),)),
    Kernel("Add", lambda x: x + 2.0**-30, operands=(np.float32(2.0**-30),)),
    Kernel("Sub", lambda x: x - 1, operands=(np.float32(1),)),
    Kernel("Mul", lambda x: x * 3, operands=(np.float32(3),)),
    Kernel("Div", lambda x: x / 3, operands=(np.float32(3),)),
    Kernel("Mod", lambda x: torch.fmod(x, 3), {"fmod": 1}, (np.float32(3),)),
    Kernel("Pow", lambda x: x**1.5, operands=(np.float32(1.5),), label="Pow(1.5)"),
    Kernel("Pow", lambda x: x**2, operands=(np.float32(2),), label="Pow(2)"),
    Kernel("Pow", lambda x: x**0.5, operands=(np.float32(0.5),)),
    _rows("ReduceSum", lambda x: x.sum(-1), _LAST, keepdims=0),
    _rows("ReduceMean", lambda x: x.mean(-1), _LAST, keepdims=0),
    _rows("ReduceProd", lambda x: x.prod(-1), _LAST, keepdims=0),
    _rows("ReduceMax", lambda x: x.amax(-1), _LAST, keepdims=0),
    _rows("ReduceMin", lambda x: x.amin(-1), _LAST, keepdims=0),
    _rows("ReduceL1", lambda x: x.norm(p=1, dim=-1), _LAST, keepdims=0),
    _rows("ReduceL2", lambda x: x.norm(dim=-1), _LAST, keepdims=0),
    _rows("ReduceLogSumExp", lambda x: x.logsumexp(-1), _LAST, keepdims=0),
    _rows("ArgMax", lambda x: x.argmax(-1), axis=-1, keepdims=0),
    _rows("ArgMin", lambda x: x.argmin(-1), axis=-1, keepdims=0),
    _rows("CumSum", lambda x: x.cumsum(-1), np.array(-1)),
    _rows("Softmax", lambda x: x.softmax(-1), axis=-1),
    _rows("LogSoftmax", lambda x: x.log_softmax(-1), axis=-1),
    Kernel("TopK", lambda x: x.topk(3)[0], {"axis": -1}, (np.array([3]),), "rows", outputs=2),
    Kernel("LayerNormalization", lambda x: F.layer_norm(x, (ROW,)), {"epsilon": 1e-5}, (_ONE,), "rows"),
    Kernel(
        "SimplifiedLayerNormalization", lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        {"epsilon": 1e-6}, (_ONE,), "rows",
    ),
    _rows("ReduceSum", lambda x: x.sum(-1), _LAST, over="integers", keepdims=0),
    _rows("ReduceProd", lambda x: x.prod(-1), _LAST, over="integers", keepdims=0),
    _rows("ReduceMax", lambda x: x.amax(-1), _LAST, over="integers", keepdims=0),
    Kernel("Div", lambda x: torch.div(x, 7, rounding_mode="trunc"), {}, (np.array(7),), "integers", label="Div(int64)"),
    Kernel("Mod", lambda x: x % 7, {}, (np.array(7),), "integers", label="Mod(int64)"),
    Kernel("CumSum", lambda x: x.cumsum(-1), {}, (np.array(-1),), "integers", label="CumSum(int64)"),
)  # fmt: skip
