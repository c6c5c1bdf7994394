"""Experts whose own code makes floats of codes, as codes: views of the module's own codes and scales, read live.

Nothing is copied or held twice: the module keeps its buffers, and what is written to them shows at the next call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeopt.ir.bank_format import MatrixFormat
from moeopt.ir.coded_function import CodedFunction, CodedMatrix, SlotPart
from moeopt.ir.row_function import RowFunction
from moeopt.ir.weight_refs import SlotRefs
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.rewrite.codes_at_calls import CodesReadAtCalls
from moeopt.rewrite.live_slots import LiveSlots
from moeopt.rewrite.live_weights import Place
from moeopt.rewrite.same_layout import Arm, Remembered, SameLayout

_BANK = "the bank of these addresses"
"""Where a table that a kernel fills has the bank: it is gone with the addresses."""


class SlotCodes(CodesReadAtCalls):
    """A bank of codes over the slots of a row function.

    Args:
        module: the block.
        experts: what each expert has in its slots.
        row: the function as it was recognised.
        coded: the same as the grouped op has it.
        check: called with the number of each expert at each call; may raise :class:`~.refused_call.Stale`.
        arm: adds what ``check`` asks of all experts to a guard.

    Attributes:
        live, function: what computes the same with gradients of scales.
    """

    def __init__(
        self, module: nn.Module, experts: list[SlotRefs], row: RowFunction, coded: CodedFunction,
        check: Callable[[int], None], arm: Arm | None = None,
    ) -> None:  # fmt: skip
        self.live, self.function, self.coded = LiveSlots(module, experts, check), row, coded
        self.experts, self.num_experts = experts, len(experts)
        self.layouts, self.dtype, self.format = ("oi", "oi"), torch.float32, coded.bank_format(len(experts))
        self._places = [Place(module, path) for path in sorted({p.path for ref in experts for p in ref.slots})]
        scales = sorted({ref.slots[s].path for ref in experts for s in coded.scale_slots})
        self._scales = [Place(module, path) for path in scales]
        self._lay, self._views = SameLayout(self._places, len(experts), check, arm), False
        self.handed = {(self.layouts, self.dtype): self}

    def slots(self, e: int) -> list[Tensor]:
        """What expert ``e`` has in the slots of ``function``: this is a ``SlotBank`` too."""
        return self.live.slots(e)

    @property
    def trained(self) -> bool:
        """Whether a scale wants a gradient, which the grouped op has none for."""
        return torch.is_grad_enabled() and any(place.read().requires_grad for place in self._scales)

    @property
    def out_features(self) -> int:
        """As the base class has it; told by the format, so that an exporter sees no reads of weights."""
        return self.format.w_out.shape[0]

    def of_one_call(self) -> QuantizedExpertWeights:
        """The bank read once for a call, where each read copies; else this bank itself."""
        if self._views and not torch.is_grad_enabled():  # else it is looked at now: a look asks each expert
            return self
        found, known = self._look()
        return found.handed_out(self.layouts, self.dtype) if known is None else self

    def remembered(self, rows: int) -> Remembered | None:
        """As ``LiveCodes.remembered``: what a kernel keeps of the present addresses, and the tensors to keep alive."""
        del rows
        return self._look()[1]

    def now(self) -> QuantizedExpertWeights:
        """The bank as it is now, for one call."""
        return self._look()[0]

    def _look(self) -> tuple[QuantizedExpertWeights, Remembered | None]:
        """The bank, and what a kernel remembers of it; None where a part of the bank is a copy, for this call only."""
        looked = None if torch.compiler.is_compiling() else self._lay.look()
        if looked is None:
            return self._made(), None
        table, tensors = looked
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self._made(), None  # a view made without gradients passes none on
        bank: QuantizedExpertWeights | None = table.get(_BANK)
        if bank is None:
            bank, held = self._made(), {t.untyped_storage().data_ptr() for t in tensors}
            self._views = all(t.untyped_storage().data_ptr() in held for t in bank.tensors().values())
            if not self._views:
                return bank, None
            table[_BANK] = bank
        return bank, looked

    def _made(self) -> QuantizedExpertWeights:
        slots = [self.live.slots(e) for e in range(self.num_experts)]

        def matrices(one: CodedMatrix) -> QuantizedMatrices:
            parts = [[part.read(held[part.slot]) for held in slots] for part in one.parts]
            return QuantizedMatrices(MatrixFormat(one.format, one.shape), self.num_experts, parts)

        def vectors(part: SlotPart | None) -> list[Tensor] | None:
            return None if part is None else [part.read(held[part.slot]) for held in slots]

        b_in = [vectors(b) for b in self.coded.b_in] if any(b is not None for b in self.coded.b_in) else None
        return QuantizedExpertWeights(
            [matrices(w) for w in self.coded.w_in], matrices(self.coded.w_out), b_in, vectors(self.coded.b_out),
            format=self.format,
        )  # fmt: skip
