"""Conditions of Python on the number of rows of a data-dependent tensor, in a run with values: is it zero?

    rows = torch.where(ids == e)[0]
    if rows.numel() == 0: continue         n == 0, n > 0, n >= 1, `if n`, `not n`: zero rows, or some

A comparison of Python numbers is no op that a mode could see. So while :class:`RowCounts` is open, sizes are instances
of a subclass of ``int`` that reports this comparison. ``len()`` returns plain ints only; for ``len()`` the bytecode
after the call is read.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from moeopt.capture.bool_reads import asked_from
from moeopt.value_types import FxTarget, PyObject

if TYPE_CHECKING:
    from typing_extensions import Self

Asked = tuple[CodeType, int]
"""The code object that has the condition, and the offset of the instruction."""
aten = torch.ops.aten
_SOME = {("==", 0): False, ("!=", 0): True, (">", 0): True, ("<=", 0): False, ("<", 1): False, (">=", 1): True}
"""The comparisons that decide whether a number is zero, and their result where it is not."""
_PICKS = {aten.nonzero.default: 0, aten.index.Tensor: 1, aten.masked_select.default: 1}
"""For each op with a data-dependent number of rows, the argument that is the mask."""
_SHAPES: tuple[Any, ...] = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]  # torch
_NUMBERS = (Tensor.numel, Tensor.nelement, torch.numel, Tensor.item)


def masks_of(func: FxTarget, args: tuple[Any, ...]) -> list[Tensor]:
    """The masks that decide how many rows the result of a call has."""
    given = [] if func not in _PICKS else [t for t in pytree.tree_leaves(args[_PICKS[func]]) if isinstance(t, Tensor)]
    return given if func is aten.nonzero.default else [t for t in given if t.dtype in (torch.bool, torch.uint8)]


class RowCounts(TorchFunctionMode):
    """A mode in which sizes report comparisons with zero.

    Args:
        answer: called with the place of the condition, its answer, and the places of the masks that decide the number
            of rows (None for an unknown cause); returns the answer that Python gets.
        about: returns the place of the mask whose entries a number counts, if any.
    """

    def __init__(
        self, answer: Callable[[Asked, bool, frozenset[Asked | None]], bool], about: Callable[[Tensor], Asked | None]
    ) -> None:
        super().__init__()
        self._answer, self._about, self._open = answer, about, True
        self._chosen: dict[int, tuple[frozenset[Asked | None], int]] = {}  # by memory: masks, number of rows
        self._held: list[StorageWeakRef] = []

    def __exit__(self, *error: PyObject) -> None:
        self._open = False  # sizes that the code stored act as plain numbers from now on
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch

    def enter(self, func: FxTarget, args: PyObject, kwargs: PyObject, out: PyObject, place: Asked | None) -> None:
        """Record the masks that decide how many rows the result of a call has."""
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided]
        varies = torch.Tag.dynamic_output_shape in getattr(func, "tags", ()) and func is not aten.index.Tensor
        if varies or masks_of(func, args):
            known = frozenset([place if func in _PICKS else None])
            for tensor in results:
                self._set(tensor, known, len(tensor) if tensor.dim() else 1)
            return
        given = args[1:] if func in (aten.index.Tensor, aten.index_select.default, aten.gather.default) else args
        read = [t for t in pytree.tree_leaves((given, kwargs)) if isinstance(t, Tensor) and t.layout == torch.strided]
        found = [self._chosen[at] for at in map(_memory, read) if at in self._chosen]
        own = set(map(_memory, pytree.tree_leaves((args, kwargs)))) if found else set()
        for tensor in results if found else ():
            counted = [(masks, count) for masks, count in found if count in tensor.shape]
            if counted and _memory(tensor) not in own:
                self._set(tensor, frozenset().union(*(masks for masks, _ in counted)), counted[0][1])

    def _set(self, tensor: Tensor, masks: frozenset[Asked | None], count: int) -> None:
        self._chosen[_memory(tensor)] = masks, count
        self._held.append(StorageWeakRef(tensor.untyped_storage()))

    def __torch_function__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        out = func(*args, **(kwargs or {}))
        if func is Tensor.__len__:
            place = asked_from()
            masks, asks = self._masks(args[0], out), place is not None and asks_for_some(*place)
            told = self._answer(place, out > 0, masks) if place is not None and asks else out > 0
            return out if told is (out > 0) else int(told)
        if func in _SHAPES and isinstance(out, torch.Size):
            return torch.Size([_Count(n, self, self._masks(args[0], n)) for n in out])
        if func in (*_SHAPES, *_NUMBERS) and type(out) is int:
            about = self._about(args[0]) if func is Tensor.item else None
            return _Count(out, self, frozenset([about]) if func is Tensor.item else self._masks(args[0], out))
        return out

    def _masks(self, tensor: Tensor, size: int) -> frozenset[Asked | None]:
        masks, count = self._chosen.get(_memory(tensor), (frozenset([None]), 0))
        return masks if size == count or size == tensor.numel() else frozenset([None])

    def ask(self, masks: frozenset[Asked | None], own: bool) -> bool:
        """The answer for the code that runs now, instead of ``own``."""
        place = asked_from() if self._open else None
        return own if place is None else self._answer(place, own, masks)


class _Told(int):
    """The result of a comparison with zero; it reports when Python branches on it."""

    _into: RowCounts
    _masks: frozenset[Asked | None]

    def __new__(cls, value: int, into: RowCounts, masks: frozenset[Asked | None]) -> Self:
        made = super().__new__(cls, value)
        made._into, made._masks = into, masks
        return made

    def __bool__(self) -> bool:
        return self._into.ask(self._masks, int(self) != 0)

    def __reduce__(self) -> PyObject:
        return bool, (int(self),)


class _Count(_Told):
    """A size, which reports when it is compared with zero."""

    __hash__ = int.__hash__

    def _compared(self, name: str, own: PyObject, other: object) -> PyObject:
        asks = type(other) is int and (name, other) in _SOME
        return _Told(own, self._into, self._masks) if asks else own

    def __eq__(self, other: object) -> PyObject:
        return self._compared("==", int.__eq__(self, other), other)

    def __ne__(self, other: object) -> PyObject:
        return self._compared("!=", int.__ne__(self, other), other)

    def __lt__(self, other: int) -> PyObject:
        return self._compared("<", int.__lt__(self, other), other)

    def __le__(self, other: int) -> PyObject:
        return self._compared("<=", int.__le__(self, other), other)

    def __gt__(self, other: int) -> PyObject:
        return self._compared(">", int.__gt__(self, other), other)

    def __ge__(self, other: int) -> PyObject:
        return self._compared(">=", int.__ge__(self, other), other)

    def __reduce__(self) -> PyObject:
        return int, (int(self),)


@functools.lru_cache(maxsize=4096)
def asks_for_some(code: CodeType, at: int) -> bool:
    """Whether the result of the call at an instruction is only compared with zero."""
    after = [one for one in dis.get_instructions(code) if one.offset > at and one.opname not in _IDLE]
    if len(after) > 1 and after[0].opname in _CONSTANTS and after[1].opname == "COMPARE_OP":
        compared = str(after[1].argrepr).removeprefix("bool(").removesuffix(")")
        if (compared, after[0].argval) not in _SOME:
            return False
        after = after[2:]
    while after and after[0].opname == "UNARY_NOT":
        after = after[1:]
    name = after[0].opname if after else ""
    return "JUMP" in name and "_IF_" in name and "OR_POP" not in name


_CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT")
_IDLE = ("CACHE", "TO_BOOL", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "COPY_FREE_VARS")


def _memory(tensor: PyObject) -> int:
    strided = isinstance(tensor, Tensor) and tensor.layout == torch.strided
    return tensor.untyped_storage()._cdata if strided else 0
