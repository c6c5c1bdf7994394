"""The weights of one op of a block, as the op takes them, read from the module at each call."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from moeopt.ir.coded_function import CodedFunction
from moeopt.ir.row_function import RowFunction
from moeopt.rewrite.live_slots import LiveSlots
from moeopt.rewrite.live_weights import LiveExpertWeights, Place
from moeopt.rewrite.module_guard import Watch
from moeopt.rewrite.refused_call import Stale
from moeopt.rewrite.same_layout import Arm
from moeopt.rewrite.slot_codes import SlotCodes
from moeopt.value_types import PyObject


def live_bank(
    module: nn.Module, refs: PyObject, spec: PyObject, check: Callable[[int], None] = lambda e: None,
    place: type[Place] = Place, arm: Arm | None = None,
) -> PyObject:  # fmt: skip
    """The weights at ``refs`` of ``module``; ``check`` is asked before each expert is read, ``arm`` once for all."""
    if isinstance(spec, RowFunction):
        return LiveSlots(module, refs, check, place)
    return LiveExpertWeights(module, refs, (spec.w_in_layout, spec.w_out_layout), check, place, arm)


def watched_bank(
    module: nn.Module, refs: PyObject, spec: PyObject, watch: Watch, bank: int, coded: CodedFunction | None = None
) -> tuple[PyObject, PyObject]:
    """:func:`live_bank` of the bank number ``bank``, and its function: an expert that is not as it was verified is
    :class:`Stale`.

    Args:
        coded: how ``spec``, a function of a row that makes floats of codes, is the op on these codes.
    """

    def check(expert: int) -> None:
        if reason := watch.expert((bank, expert)):
            raise Stale(reason)

    arm = functools.partial(watch.arm, bank)
    if coded is not None:
        return SlotCodes(module, refs, spec, coded, check, arm), coded.spec
    return live_bank(module, refs, spec, check, arm=arm), spec


def with_gradients(bank: PyObject, spec: PyObject) -> tuple[PyObject, PyObject]:
    """The same, or what computes the same with gradients of scales, where a call wants some."""
    return (bank.live, bank.function) if isinstance(bank, SlotCodes) and bank.trained else (bank, spec)
