"""Conditions of Python on data that a graph may replace by one fixed answer.

    if mask.any(): y[mask] = f(x[mask])    "some row": without rows the code inside computes nothing
    if rows.numel() == 0: continue         the same condition on a size
    assert x.isfinite().all()              the other answer raises, so it has no result

``torch.export`` stops at each of these. Whether "some row" may be fixed is found by running the model with its masks
emptied, once as it is and once with the condition answered as if there were rows. Both runs must return and leave the
same bits, made by the same ops from the same tensors (``moeopt.lower.tensor_terms``), since equal bits alone may be
chance. In a loop over experts all masks are emptied, and then every second mask: with all masks empty, a ``break``
would change nothing. An assertion is recognised by the error that the other answer raises, see
``moeopt.capture.bool_reads``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.bool_reads import READ, asked_from, raised_in
from moeopt.capture.foreign_ops import of_another_library
from moeopt.capture.isolated_run import undone
from moeopt.capture.tape import clone_inputs
from moeopt.capture.tree import ArgsKwargs
from moeopt.lower.row_counts import Asked, RowCounts, masks_of
from moeopt.lower.tensor_terms import Terms
from moeopt.ops.override import default_impl
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten
_WHETHER = (aten.any.default, aten.sum.default, aten.count_nonzero.default)
_COMPARED = {aten.gt.Scalar: 0, aten.ne.Scalar: 0, aten.eq.Scalar: 0, aten.le.Scalar: 0, aten.ge.Scalar: 1,
             aten.lt.Scalar: 1}  # fmt: skip
_NOTS = (aten.logical_not.default, aten.bitwise_not.default)
_MANY = 1 << 12
"""Masks that get a row in one run, at most: a ``while`` that waits for an empty mask would never end."""
_ALL = (True,)
_MORE = 16
"""How often a condition may be read more than in the first run: a forced answer may keep a ``while`` running."""


class _Unsafe(Exception):
    """An op of another library would get no rows."""


class _Endless(Exception):
    """A condition is read again and again: the run would not end."""


class _Questions(TorchDispatchMode):
    """A mode that records the bools that Python reads, forces some of them, and empties some masks before.

    Args:
        forced: answers by place of the condition.
        emptied: places at which masks are set to False before they are reduced to a bool or a size.
        most: how often each condition may be read; ``_Endless`` is raised ``_MORE`` reads later.
        known: interned terms and emptied masks of other runs, with which the terms of this run are compared.
        turns: a cycle that says of each mask at a place, in order, whether the mask is emptied.

    Attributes:
        answers: by place, the unforced answers.
        masks: by place of a condition, the places of the masks that decide the answer.
        terms: the terms of the run's tensors, where ``known`` is given.
    """

    def __init__(
        self, forced: Mapping[Asked, bool], emptied: set[Asked | None], most: Mapping[Asked, int] | None = None,
        known: tuple[dict[Hashable, int], set[int]] | None = None, turns: tuple[bool, ...] = _ALL,
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.forced, self.emptied, self.most, self._turns = forced, emptied, most, turns
        self._met: Counter[Asked | None] = Counter()
        self._given = 0
        self.terms: Terms | None = None
        self._known = known
        self.answers: dict[Asked, list[bool]] = {}
        self.masks: dict[Asked, set[Asked | None]] = {}
        self._about: dict[int, tuple[Tensor, Asked]] = {}  # reduced masks by id; held so that no id is used twice
        self.sizes = RowCounts(self._size_asked, lambda t: self._about.get(id(t), (t, None))[1])

    def starts(self, model: nn.Module, given: PyObject) -> None:
        """A run of ``model`` on ``given`` starts."""
        self.terms = None if self._known is None else Terms(self._known[0], model, given, self._known[1])

    def _empty(self, place: Asked | None, masks: list[Tensor]) -> None:
        if place not in self.emptied or self.terms is None or not masks:
            return
        turn = self._turns[self._met[place] % len(self._turns)]
        self._met[place] += 1
        for mask in masks:
            if turn or not mask.numel():
                self.terms.empty(mask)
            elif not mask.any():  # a mask that is not emptied has a row, whatever these inputs choose
                mask[(0,) * mask.dim()] = 1
                self._given += 1
        if self._given > _MANY:
            raise _Endless

    def _call(self, func: FxTarget, args: PyObject, kwargs: PyObject) -> PyObject:
        if self.terms is not None and of_another_library(func):
            given = pytree.tree_leaves((args, kwargs))
            if any(isinstance(t, Tensor) and not t.numel() for t in given):
                raise _Unsafe
        return func(*args, **kwargs) if self.terms is None else self.terms.call(func, args, kwargs)

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        place = asked_from()
        whether = func in _WHETHER and len(args) == 1 and args[0].dtype == torch.bool
        self._empty(place, [args[0]] if whether else masks_of(func, args))
        if whether:
            out = self._call(func, args, kwargs or {})
            if place is not None:
                self._about[id(out)] = (out, place)
            return out
        out = self._call(func, args, kwargs or {})
        self.sizes.enter(func, args, kwargs, out, place)
        told = self._about.get(id(args[0])) if args else None
        if told is not None and (func in _NOTS or (func in _COMPARED and args[1] == _COMPARED[func])):
            self._about[id(out)] = (out, told[1])
        if func is not READ or not isinstance(out, bool) or place is None:
            return out
        return self._asked(place, out, [None if told is None else told[1]])

    def _size_asked(self, place: Asked, own: bool, masks: Iterable[Asked | None]) -> bool:
        if set(masks) == {None}:  # the size of an input, or another size that no mask decides
            self.masks.setdefault(place, set()).add(None)
            return own
        return self._asked(place, own, masks)

    def _asked(self, place: Asked, own: bool, masks: Iterable[Asked | None]) -> bool:
        asked = self.answers.setdefault(place, [])
        asked.append(own)
        self.masks.setdefault(place, set()).update(masks)
        if self.most is not None and len(asked) > self.most.get(place, 0) + _MORE:
            raise _Endless
        return self.forced.get(place, own)


def settled_reads(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Asked, bool]:
    """By place of the condition, the answers that hold for all inputs; see the module's docstring."""
    first = _Questions({}, set())
    if _run(model, args, kwargs, first) is None:
        return {}
    found: dict[Asked, bool] = {}
    for place, answers in first.answers.items():
        masks = first.masks[place]
        whether = None
        if None not in masks:
            whether = _some_row(model, (args, kwargs), place, masks, found)
        if whether is None and len(set(answers)) == 1 and _asserts(model, args, kwargs, place, not answers[0]):
            whether = answers[0]
        if whether is not None:
            found[place] = whether
    return found


def _some_row(
    model: nn.Module, call: ArgsKwargs, place: Asked, masks: set[Asked | None], known: Mapping[Asked, bool]
) -> bool | None:
    """The answer at ``place`` for "some row", if that answer is right without rows too; else None."""
    answer: bool | None = None
    for turns in (_ALL, (True, False), (False, True)):
        tried = _some_row_in(turns, answer, model, call, place, masks, known)
        if tried is None:
            return None
        answer, times = tried
        if times < 2:  # no loop: there is no second mask to keep
            break
    return answer


def _some_row_in(
    turns: tuple[bool, ...], answer: bool | None, model: nn.Module, call: ArgsKwargs, place: Asked,
    masks: set[Asked | None], known: Mapping[Asked, bool],
) -> tuple[bool, int] | None:  # fmt: skip
    """As :func:`_some_row` with the masks of ``turns`` emptied; also how often the condition was read then.

    Args:
        answer: the forced answer; None where all masks are emptied: there it is the opposite of the model's answer.
    """
    terms: tuple[dict[Hashable, int], set[int]] = {}, set()
    for _ in range(2):  # the second time masks are emptied as soon as made: rows may be picked before the condition
        natural = _Questions({}, masks, None, terms, turns)
        without = _run(model, *call, natural)
        own = natural.answers.get(place, [])
        if without is None or (turns == _ALL and len(set(own)) != 1):
            return None
        some = not own[0] if answer is None else answer
        most = {at: len(asked) for at, asked in natural.answers.items()}
        told = _Questions({**known, place: some}, masks, most, terms, turns)
        with_rows = _run(model, *call, told)
        if with_rows is not None and _same(without, with_rows):
            return some, len(told.answers.get(place, ()))
    return None


def _asserts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], place: Asked, other: bool) -> bool:
    raised: list[Exception] = []
    _run(model, args, kwargs, _Questions({place: other}, set(), {}), raised.append)
    return bool(raised) and raised_in(raised[0], place[0])


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: _Questions,
    failed: Callable[[Exception], object] = lambda err: None,
) -> list[Any] | None:  # fmt: skip
    """The model's results, inputs and buffers after a run on copies of the inputs, with their terms; None for an error.

    ``failed`` is called with the error.
    """
    args, kwargs = clone_inputs((args, kwargs))
    mode.starts(model, (args, kwargs))
    with undone(model) as watched:
        try:
            # default_impl: an exporter counts the calls of its stand-in for the experts' op
            with default_impl(), watched, mode, mode.sizes:
                leaves = pytree.tree_leaves(model(*args, **kwargs))
        except Exception as err:
            failed(err)
            return None
        left = [*leaves, *pytree.tree_leaves((args, kwargs)), *model.buffers()]
        terms = mode.terms
        values = [None if terms is None or not isinstance(t, Tensor) else terms.value(t) for t in left]
        return [*values, *(t.detach().clone() if isinstance(t, Tensor) else t for t in left)]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(_equal, a, b))


def _equal(a: PyObject, b: PyObject) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (a is b or bool(a == b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
