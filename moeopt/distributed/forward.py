"""A rewritten block whose experts lie on several ranks: its graph runs here, its experts where they are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeopt.distributed.dispatch import Dispatch
from moeopt.distributed.local_codes import LocalCodes
from moeopt.distributed.shards import LocalPlace
from moeopt.errors import NotSaveableError, UsageError
from moeopt.ir.bank_format import BankFormat
from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef, SlotRefs
from moeopt.ops.experts import experts
from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.install import RewrittenForward
from moeopt.rewrite.live_bank import live_bank
from moeopt.rewrite.refused_call import KeptResults
from moeopt.value_types import PyObject

WHY_NO_GRAPH = "experts that lie on several ranks are reached by collectives on sizes that each call decides"
"""What ``torch.compile(fullgraph=True)`` says of a distributed block; without it, the code around is compiled."""


class RankExperts:
    """All E experts of one op, as the op takes them: those of this rank are run, the others' tokens are sent.

    Args:
        local: the live weights of this rank's experts, in their order.
        own: which experts those are.
    """

    def __init__(self, dispatch: Dispatch, local: PyObject, own: Sequence[int]) -> None:
        self.dispatch, self.local, self.own = dispatch, local, list(own)
        self.num_experts = len(dispatch.homes.ranks)

    def stacked(self) -> None:
        """Most experts are elsewhere."""
        return None

    @torch.compiler.disable(reason=WHY_NO_GRAPH)  # type: ignore[untyped-decorator]
    def run(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, spec: ExpertsSpec | RowFunction, skip_idle: bool
    ) -> Tensor:
        """What ``moeopt::experts`` gives; a collective call."""
        if type(x_TH) not in (Tensor, nn.Parameter) or x_TH.is_meta:
            raise NotSaveableError(
                f"{self.dispatch.block}: {WHY_NO_GRAPH}, so there is no graph of it; save or export the optimised "
                "model before moeopt.distribute"
            )
        if self.dispatch.homes.copied and self.dispatch.trained and torch.is_grad_enabled():
            raise UsageError(
                f"{self.dispatch.block}: its placement has copies of experts, whose gradients would be those of their "
                "own tokens only; train with a placement without copies, or call the model under torch.no_grad()"
            )
        return self.dispatch(x_TH, ids_TK, weights_TK, spec, functools.partial(self._compute, spec, skip_idle))

    def _compute(
        self, spec: ExpertsSpec | RowFunction, skip_idle: bool, x_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        if not self.own:  # the result hangs on x all the same: gradients are exchanged by every rank
            nothing_N1 = x_NH[:, :0].sum(1, keepdim=True).to(dtype)  # zeros, whatever x is
            return nothing_N1.expand(-1, self.dispatch.width)
        return experts(x_NH, ids_NK, weights_NK, self.local, partial_sums(spec, dtype), skip_idle)


@functools.lru_cache(maxsize=1024)
def partial_sums(spec: ExpertsSpec | RowFunction, dtype: torch.dtype) -> ExpertsSpec | RowFunction:
    """The function of some of the experts: their terms summed and handed out in ``dtype``."""
    name = str(dtype).removeprefix("torch.")
    return dataclasses.replace(spec, accum_dtype=name, out_dtype=name, out_of_range="nothing")


class Sharded(NamedTuple):
    """One op: how its experts are reached, which are this rank's, where those lie in the module, and their codes."""

    dispatch: Dispatch
    own: Sequence[int]
    refs: Sequence[ExpertRef | SlotRefs]
    format: BankFormat | None


class DistributedForward(RewrittenForward):
    """A :class:`RewrittenForward` some of whose ops have their experts on several ranks.

    Args:
        sharded: those, by the number of the op.

    Attributes:
        divided: that experts of the module are elsewhere, and so is what its own code would need.
    """

    divided = True

    def __init__(self, module: nn.Module, program: BlockProgram, sharded: Mapping[int, Sharded]) -> None:
        self.sharded = dict(sharded)
        super().__init__(module, program)

    def _bank(self, index: int, refs: PyObject, spec: PyObject) -> tuple[PyObject, PyObject]:
        if index not in self.sharded:
            return super()._bank(index, refs, spec)
        dispatch, own, local, format = self.sharded[index]
        held: PyObject = None
        if own and format is not None:
            held = LocalCodes(self.module, index, [r for r in local if isinstance(r, ExpertRef)], spec, format)
        elif own:
            held = live_bank(self.module, list(local), spec, place=LocalPlace)
        return RankExperts(dispatch, held, own), spec

    def _fall_back(self, refusal: str, args: PyObject, kwargs: PyObject, results: KeptResults) -> PyObject:
        name = next(iter(self.sharded.values())).dispatch.block
        raise UsageError(
            f"{name} cannot run its original code, for its experts lie on several ranks, and it would have to: "
            f"{refusal}. Call the model as it was optimised, or optimise and distribute the changed model again"
        )
