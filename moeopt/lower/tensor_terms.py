"""Symbolic terms of tensors: which ops on which inputs made a tensor, independent of its numbers.

Two runs return the same tensor for every input if they make it by the same ops from the same inputs. Ops that cannot
change the result are left out: rows written where a mask is empty, a copy, a sum with zeros. Equal numbers prove less:
a clamp returns all numbers within its limits unchanged. All numbers are taken to be finite, since infinity times zero
is no zero.

A *term* is an int that stands for (op, terms of its arguments). The memory of a tensor has a term, which in-place ops
replace; a tensor is the term of its memory with its strides and offset there. Memory is *nothing* where it has no
element, or only zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from moeopt.capture.functional import mutated_args, unsaid_writes
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default)
_WRITTEN_AT: dict[FxTarget, int] = {
    aten.index_put_.default: 1, aten.index_put.default: 1, aten._index_put_impl_.default: 1,
    aten._unsafe_index_put.default: 1,
    aten.masked_fill_.Scalar: 1, aten.masked_fill.Scalar: 1, aten.masked_fill_.Tensor: 1, aten.masked_fill.Tensor: 1,
    aten.masked_scatter_.default: 1, aten.masked_scatter.default: 1, aten.index_add_.default: 2,
    aten.index_add.default: 2, aten.index_copy_.default: 2, aten.index_copy.default: 2,
    aten.index_fill_.int_Scalar: 2, aten.index_fill.int_Scalar: 2, aten.scatter_.src: 2, aten.scatter.src: 2,
    aten.scatter_.value: 2, aten.scatter.value: 2, aten.scatter_add_.default: 2, aten.scatter_add.default: 2,
    aten.scatter_reduce_.two: 2, aten.scatter_reduce.two: 2,
}  # fmt: skip
"""For ops that write at places, the argument that names the places; with no place they return their input."""
_SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.bitwise_or.Tensor,
         aten.logical_or.default)  # fmt: skip
_PRODUCTS = (aten.mul.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_KEEP_ZEROS = (aten.mul.Scalar, aten.sum.default, aten.sum.dim_IntList,
               aten.any.default, aten.any.dim, aten.neg.default, aten.index.Tensor, aten.index_select.default,
               aten.gather.default, aten.repeat.default, aten.cumsum.default, *_COPIES)  # fmt: skip
_PICKS = (aten.index.Tensor, aten.masked_select.default)
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
Term = int


class Terms:
    """The terms of one run of a model.

    Args:
        interned: the terms of all runs that are compared.
        model: the model whose weights and buffers have their names as terms.
        given: the inputs, which have their positions as terms.
        emptied: the terms of masks that are set to False as soon as they are made; :meth:`empty` adds to this set.
    """

    def __init__(
        self, interned: dict[Hashable, Term], model: nn.Module, given: PyObject, emptied: set[Term] | None = None
    ) -> None:
        self._interned = interned
        self._memory: dict[int, Term] = {}
        self._held: list[StorageWeakRef] = []  # so that the address of freed memory is not used again
        self._nothing: set[Term] = set()
        self._copy_of: dict[Hashable, Hashable] = {}
        self._parts: set[Hashable] = set()
        self._emptied: set[Term] = set() if emptied is None else emptied
        self._random = 0
        named = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in [*named, *enumerate(pytree.tree_leaves(given))]:
            if isinstance(tensor, Tensor) and (at := _memory_of(tensor)) is not None and at not in self._memory:
                self._set(tensor, self._term("leaf", str(type(name)), name))

    def call(self, func: FxTarget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyObject:
        """``func(*args, **kwargs)``, with the terms of its results recorded."""
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        random = torch.Tag.nondeterministic_seeded in func.tags
        self._random += random
        key = func, self._frozen(args), self._frozen(kwargs), self._random if random else 0
        nothing = self._nothing_of(func, given)
        same = self._unchanged(func, args, kwargs)
        kept = None if same is None else (self._value(same), self._whole_term(same), same.stride())
        kind = None if same is None else (same.shape, same.dtype)
        written = [
            t
            for t in [*mutated_args(func, args, kwargs), *unsaid_writes(func, args)]
            if t.numel() or not self.is_nothing(t)
        ]
        shared = {_memory_of(t) for t in given}
        out = func(*args, **kwargs)
        if same is None:
            for number, tensor in enumerate(written):
                self._set(tensor, self._term("written", number, key))
        for number, tensor in enumerate(pytree.tree_leaves(out)):
            if not isinstance(tensor, Tensor) or _memory_of(tensor) in shared:
                continue
            if kept is not None and kind == (tensor.shape, tensor.dtype):
                self._set_copy(tensor, *kept)
                continue
            term = self._term("made", number, key)
            self._set(tensor, term)
            if term in self._emptied:
                tensor.zero_()
            if term in self._emptied or nothing or (nothing is None and not tensor.numel()):
                self._nothing.add(term)
        return out

    def empty(self, mask: Tensor) -> None:
        """Set a mask to False, and every mask that the same ops make later, before it is read."""
        before = self._whole_term(mask)
        mask.zero_()
        if before is None:  # a part of its memory: the rest keeps its values
            self._set(mask, self._term("emptied in part", self._tensor(mask)))
            self._parts.add(self._tensor(mask))
            return
        self._emptied.add(before)
        term = self._term("emptied", before)
        self._set(mask, term)
        self._nothing.add(term)

    def is_nothing(self, tensor: Tensor) -> bool:
        """Whether a tensor has no element, or only zeros, for every input."""
        at = _memory_of(tensor)
        return at is not None and (self._memory.get(at) in self._nothing or self._tensor(tensor) in self._parts)

    def _nowhere(self, places: Tensor) -> bool:
        """Whether a mask is empty, or there are no indices."""
        return (places.dtype == torch.bool or not places.numel()) and self.is_nothing(places)

    def _nothing_of(self, func: FxTarget, given: list[Tensor]) -> bool | None:
        """Whether the result of a call is *nothing*; None where it is if it has no element in this run."""
        if func in _ZEROS:
            return True
        if func is aten.nonzero.default:  # also on integers, such as a row of one_hot
            return self.is_nothing(given[0])
        if func is aten.cat.default:
            return all(map(self.is_nothing, given))
        if func in _PRODUCTS and any(map(self.is_nothing, given)):
            return True
        if func in _KEEP_ZEROS and self.is_nothing(given[0]):
            return True
        none = any(self._nowhere(t) and (func in _PICKS or not t.numel()) for t in given)
        return None if none else False

    def value(self, tensor: Tensor) -> Hashable:
        """A value that two runs give to tensors only if the tensors are equal for every input."""
        kind = tuple(tensor.shape), tensor.dtype
        return ("nothing", kind) if self.is_nothing(tensor) else (self._value(tensor), kind)

    def _unchanged(self, func: FxTarget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The argument that the call returns unchanged, or as a copy; None where it computes something."""
        if func in _COPIES:
            dtype = kwargs.get("dtype")
            return args[0] if dtype in (None, args[0].dtype) and kwargs.get("device") is None else None
        at = _WRITTEN_AT.get(func)
        if at is not None and len(args) > at:
            places = [t for t in pytree.tree_leaves(args[at]) if isinstance(t, Tensor)]
            return args[0] if any(map(self._nowhere, places)) else None
        if func is aten.where.self and self.is_nothing(args[0]):
            return args[2]  # type: ignore[no-any-return]
        if func in _SUMS and all(isinstance(t, Tensor) for t in args[:2]) and args[0].dtype == args[1].dtype:
            if self.is_nothing(args[1]) and args[0].shape == torch.broadcast_shapes(args[0].shape, args[1].shape):
                return args[0]  # type: ignore[no-any-return]
            if func is aten.add.Tensor and self.is_nothing(args[0]) and not kwargs:
                return args[1]  # type: ignore[no-any-return]
        return None

    def _term(self, *key: Hashable) -> Term:
        return self._interned.setdefault(key, len(self._interned))

    def _set(self, tensor: Tensor, term: Term) -> None:
        at = _memory_of(tensor)
        if at is not None:
            self._memory[at] = term
            self._held.append(StorageWeakRef(tensor.untyped_storage()))

    def _set_copy(self, tensor: Tensor, value: Hashable, whole: Term | None, strides: tuple[int, ...]) -> None:
        """Record that ``tensor`` is a copy of a tensor with this value and these strides.

        Args:
            whole: the term of that tensor's memory, if the memory is the tensor's alone.
        """
        if whole is not None and tensor.stride() == strides and _is_whole(tensor):
            self._set(tensor, whole)
            return
        self._set(tensor, self._term("copy", value, tensor.stride()))
        self._copy_of[self._tensor(tensor)] = value

    def _tensor(self, tensor: Tensor) -> Hashable:
        at = _memory_of(tensor)
        if at is None:
            return self._term("sparse", len(self._interned))  # a term of its own: equal to no other
        if at not in self._memory:  # made from Python numbers, which no op shows
            self._set(tensor, self._term("numbers", _bytes_of(tensor)))
        return (self._memory[at], tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(),
                tensor.is_conj(), tensor.is_neg())  # fmt: skip

    def _value(self, tensor: Tensor) -> Hashable:
        """As :meth:`_tensor`; for a copy, that of the original."""
        term = self._tensor(tensor)
        return self._copy_of.get(term, term)

    def _whole_term(self, tensor: Tensor) -> Term | None:
        """The term of the tensor's memory; None where the tensor is a part of that memory."""
        self._tensor(tensor)
        at = _memory_of(tensor)
        return self._memory[at] if at is not None and _is_whole(tensor) else None

    def _frozen(self, value: PyObject) -> Hashable:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._frozen, value))
        if isinstance(value, dict):
            return tuple((k, self._frozen(v)) for k, v in sorted(value.items()))
        return type(value), repr(value)


def _memory_of(tensor: Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor covers its memory, each element once."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return step * tensor.itemsize == tensor.untyped_storage().nbytes()


def _bytes_of(tensor: Tensor) -> bytes:
    memory = tensor.untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory, 0, (memory.nbytes(),), (1,))
    return hashlib.sha256(whole.cpu().numpy().tobytes()).digest()
