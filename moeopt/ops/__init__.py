"""The vocabulary: two ops, ``experts`` and ``route``, each with an eager definition and fast kernels."""

from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights, StackedExpertWeights
from moeopt.ops.experts import experts, flatten, unflatten
from moeopt.ops.reference import experts_reference
from moeopt.ops.route import route

__all__ = [
    "ExpertWeights",
    "ListExpertWeights",
    "StackedExpertWeights",
    "experts",
    "experts_reference",
    "flatten",
    "route",
    "unflatten",
]
