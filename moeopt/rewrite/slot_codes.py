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
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.rewrite.bank_layout import BankLayout
from moeopt.rewrite.codes_at_calls import CodesReadAtCalls
from moeopt.rewrite.live_slots import LiveSlots
from moeopt.rewrite.live_weights import Place
from moeopt.rewrite.same_layout import FEW, Arm, Remembered, SameLayout
from moeopt.value_types import PyObject

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
        entries: what a kernel keeps of each expert alone, as ``LiveExpertWeights`` has it.
    """

    def __init__(
        self, module: nn.Module, experts: list[SlotRefs], row: RowFunction, coded: CodedFunction,
        check: Callable[[int], None], arm: Arm | None = None,
    ) -> None:  # fmt: skip
        self.live, self.function, self.coded = LiveSlots(module, experts, check), row, coded
        self.experts, self.num_experts, self._check = experts, len(experts), check
        self.layouts, self.dtype, self.format = ("oi", "oi"), torch.float32, coded.bank_format(len(experts))
        paths = sorted({p.path for ref in experts for p in ref.slots})
        self._places = {path: Place(module, path) for path in paths}
        scales = {ref.slots[s].path for ref in experts for s in coded.scale_slots}
        self._scales = BankLayout([self._places[path] for path in sorted(scales)])
        floats = [place for place in self._places.values() if place.dtype.is_floating_point]
        self._floats = BankLayout(floats)
        self._lay, self._views = SameLayout(list(self._places.values()), len(experts), check, arm), False
        self._each: dict[int, BankLayout] = {}
        self._lay_alone: dict[int, tuple[object, bool]] = {}
        self.entries: dict[int, PyObject] = {}
        self.handed = {(self.layouts, self.dtype): self}

    def slots(self, e: int) -> list[Tensor]:
        """What expert ``e`` has in the slots of ``function``: this is a ``SlotBank`` too."""
        return self.live.slots(e)

    @property
    def trained(self) -> bool:
        """Whether a scale wants a gradient, which the grouped op has none for."""
        return torch.is_grad_enabled() and self._scales.any_wants_gradient()

    @property
    def wants_gradient(self) -> bool:
        """As the base class has it, told without a look at codes."""
        return self._floats.any_wants_gradient()

    @property
    def out_features(self) -> int:
        """As the base class has it; told by the format, so that an exporter sees no reads of weights."""
        return self.format.w_out.shape[0]

    def of_one_call(self, rows: int) -> QuantizedExpertWeights:
        """The bank read once for a call, where each read copies; else this bank itself."""
        if self._alone(rows) or (self._views and not torch.is_grad_enabled()):  # else it is looked at now
            return self
        found, known = self._look()
        return found.handed_out(self.layouts, self.dtype) if known is None else self

    def remembered(self, rows: int) -> Remembered | None:
        """As ``LiveCodes.remembered``: what a kernel keeps of the present addresses, and the tensors to keep alive."""
        return None if self._alone(rows) else self._look()[1]

    def _alone(self, rows: int) -> bool:
        """Whether to look at the experts that ``rows`` rows may hit, each by itself, takes less time than at all."""
        return rows < self.num_experts and len(self._places) > FEW

    def lies_alone(self, e: int) -> tuple[object, list[Tensor]] | None:
        """As ``LiveExpertWeights.lies_alone``; None also where a part of the expert is a copy, for this call only."""
        self._check(e)
        layout = self._each.get(e)
        if layout is None:
            paths = dict.fromkeys(part.path for part in self.experts[e].slots)
            layout = self._each[e] = BankLayout([self._places[path] for path in paths])
        tensors = layout.tensors()
        if tensors is None:
            return None
        lie, known = layout.lie(tensors), self._lay_alone.get(e)
        if known is None or known[0] != lie:
            held = {t.untyped_storage().data_ptr() for t in tensors}
            (ins, out), biases = self.codes(e), (*self.b_in(e), self.b_out(e))
            parts = [t for w in (*ins, out) for t in (w.codes, w.scales, w.zeros)]
            views = all(t is None or t.untyped_storage().data_ptr() in held for t in (*parts, *biases))
            known = self._lay_alone[e] = lie, views
        return (lie, tensors) if known[1] else None

    def codes(self, e: int) -> tuple[tuple[QuantizedWeight, ...], QuantizedWeight]:
        """As the base class has it; no other expert is looked at."""
        slots = self.live.slots(e)

        def weight(one: CodedMatrix) -> QuantizedWeight:
            codes, scales, *zeros = [part.read(slots[part.slot]) for part in one.parts]
            return QuantizedWeight(codes, scales, zeros[0] if zeros else None, one.format, one.shape)

        return tuple([weight(w) for w in self.coded.w_in]), weight(self.coded.w_out)

    def b_in(self, e: int) -> tuple[Tensor | None, ...]:
        """As the base class has it."""
        return tuple([self._bias(part, e) for part in self.coded.b_in])

    def b_out(self, e: int) -> Tensor | None:
        """As the base class has it."""
        return self._bias(self.coded.b_out, e)

    def norm(self, e: int) -> Tensor | None:
        """No norm is recognised after W_out."""
        return None

    def _bias(self, part: SlotPart | None, e: int) -> Tensor | None:
        return None if part is None else part.read(self.live.slots(e)[part.slot])

    def check_first(self) -> None:
        """Each expert's tensors are checked when it is read: an expert that no token reaches is nobody's business."""

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
