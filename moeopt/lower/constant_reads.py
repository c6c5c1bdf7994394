"""Values that Python reads from constant tensors while a model is traced.

A model may branch on a table of its own: ``if self.cos[0, 0] == 0: fill the table``. ``torch.export`` traces without
values and stops there, as at a branch on data. But weights, buffers and everything computed from them alone are
constants of an engine. :class:`Answers` follows the ops on such tensors, and where Python reads one (``bool``, ``int``,
``.item()``), it gets the value. A model that also writes to a tensor that it reads so, or that reads random numbers, is
refused: the value would change from call to call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from moeopt.capture.bool_reads import asked_from
from moeopt.errors import NotSaveableError
from moeopt.lower.row_counts import Asked
from moeopt.lower.traced_forms import traced_form
from moeopt.patches import size_answers
from moeopt.value_types import FxTarget, PyObject

_QUESTIONS = frozenset({
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist,
    Tensor.__contains__, Tensor.is_nonzero, torch.is_nonzero, torch.equal, Tensor.equal, torch.allclose,
    Tensor.allclose,
})  # fmt: skip
_MADE_OF_NUMBERS = frozenset({
    torch.arange, torch.zeros, torch.ones, torch.full, torch.eye, torch.linspace, torch.tensor, torch.logspace,
})  # fmt: skip


class _ConstantRead:
    """A constant tensor: how its value is computed, and from which weights.

    Attributes:
        alike: the traced tensor. It is kept alive so that no other tensor gets its ``id``.
        roots: paths of the weights and buffers it is computed from, and ids of tensors made from plain numbers.
    """

    def __init__(self, alike: Tensor, compute: Callable[[], Tensor], roots: frozenset[str]) -> None:
        self.alike, self.compute, self.roots = alike, compute, roots
        self._version = alike._version

    @property
    def untouched(self) -> bool:
        """Whether no op has written to the tensor, or to its base, since it was made."""
        return self.alike._version == self._version


class Answers(TorchFunctionMode):
    """A mode in which Python reads the values of constants.

    Attributes:
        asked: the roots of all constants that Python read.
        written: the roots of all constants that an op wrote to.
    """

    def __init__(
        self, model: nn.Module, values: dict[str, Tensor], settled: Mapping[Asked, bool] | None = None
    ) -> None:
        """``values``: of the traced weights and buffers, by name; ``settled``: known answers of conditions on data."""
        super().__init__()
        self._settled = settled or {}
        self._named = type(model).__name__
        self._known: dict[int, _ConstantRead] = {}
        self.asked: set[str] = set()
        self.written: set[str] = set()
        for name, held in _tensors(model).items():
            value = values.get(name)
            if value is not None and not value.is_meta:
                self._known[id(held)] = _ConstantRead(held, functools.partial(_same, value), frozenset([name]))

    def __torch_function__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        known = [self._known.get(id(t)) for t in tensors]
        held = [k for k in known if k is not None]
        roots = frozenset(root for k in held for root in k.roots)
        constant = len(held) == len(tensors) and all(k.untouched for k in held)
        if func in _QUESTIONS and tensors and constant:
            answer = self._answer(func, args, kwargs, held)
            self.asked |= roots
            return answer
        if (instead := self._instead(func, args, kwargs, constant)) is not None:
            return instead
        result = func(*args, **kwargs)
        if _writes(func, kwargs) or any(not k.untouched for k in held):
            self.written |= roots
            self._known = {i: k for i, k in self._known.items() if not k.roots & roots}
            return result
        free = _has_symbols(leaves)
        if not constant or free or not (tensors or func in _MADE_OF_NUMBERS):
            return result
        call = pytree.tree_map(lambda leaf: leaf, (args, kwargs))  # the caller may change its lists later
        compute = functools.cache(functools.partial(_computed, func, call[0], call[1], held))
        self._remember(result, compute, roots or frozenset([f"<{id(result)}>"]))
        return result

    def _instead(self, func: FxTarget, args: PyObject, kwargs: PyObject, constant: bool) -> PyObject:
        """The settled answer, or the form that a graph holds; None for any other call."""
        length = func is Tensor.__len__ and args[0].dim() and free_unbacked_symbols(args[0].shape[0])
        told = self._settled_here() if length or func is Tensor.__bool__ else None
        if told is not None:
            return int(told) if length else told
        return None if constant else traced_form(func, args, kwargs)

    def of_size(self, node: SymNode) -> bool | None:
        """The settled answer of a condition on a data-dependent size; None for any other size."""
        return self._settled_here() if free_unbacked_symbols(node.expr) else None

    def _settled_here(self) -> bool | None:
        place = asked_from() if self._settled else None
        return None if place is None else self._settled.get(place)

    def _answer(self, func: FxTarget, args: PyObject, kwargs: PyObject, held: PyObject) -> PyObject:
        """The value that Python reads; ``NotSaveableError`` where random numbers decide it."""
        before = _random_states()
        answer = _computed(func, args, kwargs, held)
        if not all(map(torch.equal, before, _random_states())):
            raise NotSaveableError(
                f"{self._named} cannot be saved: its Python branches on random numbers, and a graph keeps the "
                "branch of this one call: switch the noise off for inference"
            )
        return answer

    def _remember(self, result: PyObject, compute: Callable[[], Any], roots: frozenset[str]) -> None:
        """Record that ``compute`` gives the values of the tensors in ``result``."""
        if isinstance(result, Tensor):
            self._known[id(result)] = _ConstantRead(result, compute, roots)
        elif isinstance(result, (tuple, list)):
            for at, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._known[id(part)] = _ConstantRead(part, functools.partial(_part, compute, at), roots)


def _has_symbols(leaves: Sequence[Any]) -> bool:
    return any(isinstance(a, (torch.SymInt, torch.SymFloat, torch.SymBool)) for a in leaves)


def _same(value: Tensor) -> Tensor:
    return value


def _part(compute: Callable[[], Any], at: int) -> Tensor:
    part: Tensor = compute()[at]
    return part


def _computed(func: FxTarget, args: PyObject, kwargs: PyObject, held: Sequence[_ConstantRead]) -> PyObject:
    """``func(*args, **kwargs)`` on the values of the constants ``held``, which are its tensors."""
    by_id = {id(k.alike): k for k in held}
    values = pytree.tree_map_only(Tensor, lambda t: by_id[id(t)].compute(), (args, kwargs))
    with _untraced():
        return func(*values[0], **values[1])


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def _random_states() -> list[Tensor]:
    """The states of the default generators, of the CPU and of each GPU."""
    with _untraced():
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _writes(func: FxTarget, kwargs: dict[str, Any]) -> bool:
    """Whether a call may write to one of its operands: in place by name, by ``out=``, or by an assignment."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or "out" in kwargs or name in _ASSIGN


_ASSIGN = frozenset({"__setitem__", "__set__"}) | frozenset(
    f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift",
                            "rshift", "matmul")
)  # fmt: skip


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class ConstantReads:
    """What Python reads during one trace: constants of the model, and conditions on data with a settled answer."""

    def __init__(self, model: nn.Module, settled: Mapping[Asked, bool] | None = None) -> None:
        self._model, self._values, self._settled = model, _tensors(model), settled
        self.asked: set[str] = set()

    def run(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> PyObject:
        """``forward(*args, **kwargs)``, in which Python can read constants.

        Raises:
            NotSaveableError: the model writes to a constant that it read.
        """
        answers = Answers(self._model, self._values, self._settled)
        before = _tensors(self._model)
        with answers, size_answers(answers.of_size):
            result = forward(*args, **kwargs)
        self.asked |= answers.asked
        after = _tensors(self._model)
        self.refuse(answers.written | {name for name in self.asked if after.get(name) is not before.get(name)})
        return result

    def refuse(self, written: set[str]) -> None:
        """``NotSaveableError`` if a call has ``written`` to a constant that Python read."""
        if both := sorted(self.asked & written):
            raise NotSaveableError(
                f"{type(self._model).__name__} cannot be saved: its Python branches on {both[0]}, which its forward "
                "also writes, and a graph keeps the branch of this one call: fill it before, or use backend='torch'"
            )
