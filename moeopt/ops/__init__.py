"""The vocabulary: two ops, ``experts`` and ``route``, each with an eager definition and fast kernels."""

from moeopt.ops.expert_weights import Bank, ListBank, StackedBank
from moeopt.ops.experts import experts, flatten, unflatten
from moeopt.ops.reference import experts_reference
from moeopt.ops.route import route

__all__ = [
    "Bank",
    "ListBank",
    "StackedBank",
    "experts",
    "experts_reference",
    "flatten",
    "route",
    "unflatten",
]
