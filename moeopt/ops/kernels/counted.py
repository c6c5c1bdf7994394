"""How many launches a path of PyTorch calls has on a GPU, counted by running it on tiny tensors of the CPU.

Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights, StackedExpertWeights
from moeopt.value_types import FxTarget, PyObject

TINY = 8
"""H and I of the tensors that are counted with."""


class Launches(TorchDispatchMode):
    """Counts calls that start a kernel on a GPU (views do not), and calls for which the host waits."""

    WAITS = {"aten::nonzero", "aten::_local_scalar_dense", "aten::unique_consecutive", "aten::_unique2"}

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.started = self.waits = 0

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.started += not views
        self.waits += func._schema.name in self.WAITS
        return out


class Counted(NamedTuple):
    """Launches of a call with one expert a token: ``fixed`` ones and ``per_expert`` that is hit; and ``per_choice``,
    those for each expert more that a token has."""

    fixed: int
    per_expert: int
    per_choice: int

    def __str__(self) -> str:
        hit = f", {self.per_expert} for each expert that is hit" * bool(self.per_expert)
        return f"{self.fixed} launches{hit} and {self.per_choice} for each expert more that a token has"


def launches_of(path: Callable[..., Tensor], bank: ExpertWeights, spec: ExpertsSpec) -> Counted | None:
    """The launches of ``path(x, ids, weights, bank, spec)`` with weights like those of ``bank``.

    None where the CPU has no kernels for their dtype, as for products of 8-bit floats.
    """
    tiny, dtype = _tiny(bank, spec), bank.w_out(0).dtype

    def count(*ids: list[int]) -> int:
        ids_TK = torch.tensor(ids)
        x, weights = torch.zeros(len(ids), TINY, dtype=dtype), torch.zeros(ids_TK.shape, dtype=dtype)
        with Launches() as counted:
            path(x, ids_TK, weights, tiny, spec)
        started: int = counted.started
        return started

    with torch.no_grad(), torch.device("cpu"):
        try:
            one, two, twice = count([0], [0]), count([0], [1]), count([0, 0], [0, 0])
        except RuntimeError:
            return None
    return Counted(2 * one - two, two - one, twice - one)


def launches_in_words(path: Callable[..., Tensor], bank: ExpertWeights, spec: ExpertsSpec) -> str:
    """:func:`launches_of` as a part of a sentence, with a comma behind; "" where they can't be counted."""
    counted = launches_of(path, bank, spec)
    return "" if counted is None else f"{counted}, "


def one_launch(a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Stands in for ``grouped_mm`` where only launches count."""
    return a.new_zeros(a.shape[0], w.shape[2])


def _tiny(bank: ExpertWeights, spec: ExpertsSpec) -> StackedExpertWeights:
    """Two experts of ``TINY`` features, with the biases and the norm that the first expert of ``bank`` has."""
    dtype, pair = bank.w_out(0).dtype, len(bank.w_in(0))
    rows = 2 * TINY if spec.gated and pair == 1 else TINY
    shape = (rows, TINY) if spec.w_in_layout == "oi" else (TINY, rows)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(2, *shape, dtype=dtype, device="cpu")

    return StackedExpertWeights(
        [zeros(*shape) for _ in range(pair)],
        zeros(TINY, TINY),
        [None if b is None else zeros(rows) for b in bank.b_in(0)],
        None if bank.b_out(0) is None else zeros(TINY),
        None if bank.norm(0) is None else zeros(TINY),
    )
