"""Experts each of whose matrices and vectors is a whole Parameter, as lists of tensors.

Shape legend: P Parameters of a bank, each with a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeopt.ir.weight_refs import ExpertRef
from moeopt.ops.expert_weights import ListExpertWeights
from moeopt.rewrite.weight_regions import WholeTensor, whole_parts
from moeopt.value_types import PyObject


class WholeExperts:
    """Which Parameter each part of every expert is; false where a part is a part of one.

    Args:
        experts: where each expert's matrices are.
        layouts: how w_in and w_out are handed out.
        shapes: of every Parameter, by its path; their order gives the numbers.

    Attributes:
        of: of each expert the numbers of its Parameters.
    """

    def __init__(self, experts: list[ExpertRef], layouts: tuple[str, str], shapes: Mapping[str, torch.Size]) -> None:
        self._parts = whole_parts(experts, layouts, shapes)
        self.of: list[tuple[int, ...]] = []
        if self._parts:
            w_in, w_out, b_in, b_out = self._parts
            rows = zip(*w_in, w_out, *b_in, b_out, strict=True)
            self.of = [tuple(dict.fromkeys(part[0] for part in row if part is not None)) for row in rows]

    def __bool__(self) -> bool:
        return bool(self._parts)

    def listed(self, tensors: Sequence[Tensor]) -> ListExpertWeights:
        """The experts of ``tensors``, which are the P Parameters in the order of their numbers."""
        return self.listed_as(tensors, None)

    def listed_as(self, tensors: Sequence[Tensor | None], experts: Sequence[int] | None) -> ListExpertWeights:
        """The same; the expert in the place of each is that of ``experts``, where some Parameters are not there."""
        assert self._parts
        w_in, w_out, b_in, b_out = self._parts

        def part(at: WholeTensor) -> PyObject:
            if at is None or (tensor := tensors[at[0]]) is None:
                return None
            return tensor.t() if at[1] else tensor

        def parts(of: list[WholeTensor]) -> list[PyObject]:
            return [part(at) for at in (of if experts is None else [of[e] for e in experts])]

        return ListExpertWeights([parts(p) for p in w_in], parts(w_out), [parts(p) for p in b_in], parts(b_out))
