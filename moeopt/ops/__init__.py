"""The vocabulary: two ops, ``experts`` and ``route``, each with an eager definition and fast kernels."""

from moeopt.ops import experts_op as _registered  # noqa: F401  # torch.ops.moeopt.experts
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights, StackedExpertWeights
from moeopt.ops.experts import experts, flatten, unflatten
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.ops.reference import experts_reference
from moeopt.ops.route import route

__all__ = [
    "ExpertWeights",
    "ListExpertWeights",
    "QuantizedExpertWeights",
    "QuantizedMatrices",
    "QuantizedWeight",
    "StackedExpertWeights",
    "experts",
    "experts_reference",
    "flatten",
    "quantize",
    "route",
    "unflatten",
]
