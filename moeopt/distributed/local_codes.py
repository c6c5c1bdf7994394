"""The codes of this rank's experts: its part of each stack of codes, scales and zero points."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moeopt.distributed.shards import LocalPlace
from moeopt.ir.bank_format import BankFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef
from moeopt.rewrite.live_codes import LiveCodes
from moeopt.value_types import PyObject


class LocalCodes(LiveCodes):
    """A bank of quantised experts whose stacks are divided: this rank's own, read at each call.

    Args:
        experts: where this rank's own are, in their order; of their floats only biases are left.
        format: of all experts of the bank.
    """

    def __init__(
        self, module: nn.Module, index: int, experts: list[ExpertRef], spec: ExpertsSpec, format: BankFormat
    ) -> None:
        own = dataclasses.replace(format, experts=len(experts))
        super().__init__(module, index, experts, spec, own, place=LocalPlace)
        self.held: PyObject = _LocalBuffers(module, len(experts))


class _LocalBuffers:
    """The part of each divided buffer that is here, without the places that are empty."""

    def __init__(self, module: nn.Module, count: int) -> None:
        self.module, self.count = module, count
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def get(self, name: str) -> Tensor | None:
        """The same tensor at each look, until the buffer is another one."""
        whole: PyObject = self.module._buffers.get(name)
        if whole is None:
            return None
        with torch.no_grad():  # else each look gives a new view
            part: Tensor = whole.to_local() if hasattr(whole, "to_local") else whole
        known = self._known.get(name)
        if known is None or known[0] is not part:
            known = self._known[name] = part, part[: self.count]
        return known[1]
