"""Which of torch's ops have the forms of ``translate_numbers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moeopt.ir import stable_nodes as stable
from moeopt.lower.onnx.translate_numbers import (
    clamp,
    clamp_max,
    clamp_min,
    deviation,
    divided,
    floor_divided,
    log_sigmoid_forward,
    logaddexp,
    of_x,
    power,
    power_of,
    power_tensor,
    product,
    refuse,
    relu,
    remainder,
    scalar_tensor,
    total,
    total_of_all,
)
from moeopt.lower.onnx.translate_signs import atan2, copysign, signbit

aten = torch.ops.aten


def numbers() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for ``torch.onnx.export``."""
    tail = "has no form in ONNX that keeps its small results"
    return {
        aten.log1p.default: of_x(stable.log1p),
        aten.expm1.default: of_x(stable.expm1),
        aten.special_expm1.default: of_x(stable.expm1),
        aten.log_sigmoid.default: of_x(stable.log_sigmoid),
        aten.log_sigmoid_forward.default: log_sigmoid_forward,
        aten.logaddexp.default: logaddexp,
        aten.div.Tensor_mode: divided,
        aten.div.Scalar_mode: divided,
        aten.floor_divide.default: floor_divided,
        aten.floor_divide.Scalar: floor_divided,
        aten.remainder.Tensor: remainder,
        aten.remainder.Scalar: remainder,
        aten.sum.default: total_of_all,
        aten.sum.dim_IntList: total,
        aten.clamp.default: clamp,
        aten.clamp_min.default: clamp_min,
        aten.clamp_max.default: clamp_max,
        aten.relu.default: relu,
        aten.pow.Tensor_Scalar: power,
        aten.pow.Tensor_Tensor: power_tensor,
        aten.scalar_tensor.default: scalar_tensor,
        aten.std.correction: deviation,
        aten.pow.Scalar: power_of,
        aten.prod.dim_int: product,
        aten.signbit.default: signbit,
        aten.copysign.Tensor: copysign,
        aten.copysign.Scalar: copysign,
        aten.atan2.default: atan2,
        aten.erfc.default: refuse("erfc", tail),
        aten.special_erfc.default: refuse("erfc", tail),
        aten.special_erfcx.default: refuse("erfcx", tail),
        aten.special_log_ndtr.default: refuse("log_ndtr", tail),
    }
