"""The pairs of token and slot in the order of their experts, and what each has of its token.

Shape legend: T tokens, K chosen per token, E experts, R pairs of experts that exist, X any width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.kernels.few_calls import by_expert


class SortedPairs(NamedTuple):
    """The pairs in the order of their experts.

    Attributes:
        hit, counts: the experts that have rows, and how many.
        order_R, token_R: the number of each pair, t K + k, and its token.
        beyond: the numbers of pairs that name no expert, and stand for their token.
        every: whether the rows of each expert are those of x.
    """

    hit: list[int]
    counts: list[int]
    order_R: Tensor
    token_R: Tensor
    beyond: Tensor
    every: bool


def sorted_pairs(ids_TK: Tensor, E: int, spec: ExpertsSpec) -> SortedPairs:
    """The pairs of a call with these ids."""
    T, K = ids_TK.shape
    if not T * K:
        none = ids_TK.new_empty(0, dtype=torch.int64)
        return SortedPairs([], [], none, none, none, False)
    order_R, hit, counts = by_expert(ids_TK)
    beyond = order_R[:0]
    if hit[0] < 0 or hit[-1] >= E:
        first, last = sum(e < 0 for e in hit), sum(e < E for e in hit)
        begin, end = sum(counts[:first]), sum(counts[:last])
        if spec.out_of_range == "identity":
            beyond = order_R[end:]
        order_R, hit, counts = order_R[begin:end], hit[first:last], counts[first:last]
    token_R = order_R if K == 1 else order_R.div(K, rounding_mode="floor")
    every = spec.weight_on == "output" and len(hit) == E == K and counts == [T] * E and _in_turn(token_R, T)
    return SortedPairs(hit, counts, order_R, token_R, beyond, every)


def _in_turn(token_R: Tensor, T: int) -> bool:
    return bool((token_R.view(-1, T) == torch.arange(T)).all())
