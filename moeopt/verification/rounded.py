"""What a certificate says of products that read rows rounded to 8 bits, beside what was verified with float rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_leaves

from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.distance import token_distance

ALLOWED = 64
"""Roundings, in eps of a row's length, between a kernel and what it is said to compute."""


@dataclass(frozen=True)
class RoundedKernels:
    """How many products there are, of how many kinds, their worst error in eps, and how far rounding moves one."""

    products: int
    kinds: int
    error: float
    moved: float

    def stated(self, distance: float) -> dict[str, float]:
        """What a certificate says, with how far rounding moves the outputs of the example inputs, worst token."""
        return {
            "products": self.products, "kinds": self.kinds, "error_eps": round(self.error, 2), "product": self.moved,
            "outputs": distance,
        }  # fmt: skip


def distance_between(before: PyObject, after: PyObject) -> float:
    """The largest relative distance a token between two results of one structure, where both are finite."""
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    floats = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    distances = [token_distance(b, a.double()) for a, b in floats if a.numel()]
    return max((float(d[d.isfinite()].max()) for d in distances if d.isfinite().any()), default=0.0)


def moved_by_rounding(certificate: Certificate) -> float:
    """The relative L2 distance per token that another machine's rounding to 8 bits may move the outputs by.

    What it moves one product by, or all of them together where that is less: not a flipped expert.
    """
    end, rounded = certificate.end_to_end, certificate.activations
    budget = 0.0 if end is None or end.passed is not True else float(end.budget)
    return max(budget, min(float(rounded["outputs"]), float(rounded["product"])))
