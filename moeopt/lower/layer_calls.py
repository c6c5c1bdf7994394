"""One call of a layer while a model is traced: is it like another, and did it do more than make tensors?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.utils import _pytree as pytree

from moeopt.capture.held_contents import CONTAINERS
from moeopt.value_types import PyObject

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class NotStampable(BaseException):  # no ``except Exception`` of a model's own catches it
    """A layer's call did more than make tensors of its arguments and weights; ``kind`` is the layer's class."""

    def __init__(self, kind: type, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class Same:
    """An object as a value that is equal to the same object alone."""

    def __init__(self, held: PyObject) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._held is other._held

    __hash__ = None  # type: ignore[assignment]


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, ``forward`` is what a call of ``module`` runs."""
    held = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        module.__dict__["forward"] = held
        if held is None:
            del module.__dict__["forward"]


def described(args: PyObject, kwargs: PyObject) -> tuple[Any, list[Tensor]] | None:
    """A call as values that are equal for alike calls, and its tensors; None where an argument is of another kind."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    if not tensors:
        return None
    words: list[Any] = []
    first: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if not is_fake(leaf) or leaf.layout != torch.strided or leaf.requires_grad or _unbacked([leaf]):
                return None
            memory = leaf.untyped_storage()._cdata
            words.append((_kind_of(leaf), first.setdefault(memory, len(first))))
        elif isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            words.append(str(leaf.node.expr))
        elif isinstance(leaf, PLAIN):
            words.append((type(leaf).__name__, repr(leaf)))
        else:
            return None
    autocast = [(torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))) for d in ("cpu", "cuda")]
    modes = (torch.is_grad_enabled(), torch.get_default_dtype(), *autocast)
    return (str(spec), words, modes), tensors


def _kind_of(t: Tensor) -> tuple[Any, ...]:
    """All that a trace knows of a tensor; sizes as the expressions that they are."""
    sizes = [
        str(n.node.expr) if isinstance(n, torch.SymInt) else n for n in (*t.shape, *t.stride(), t.storage_offset())
    ]
    return t.dtype, t.device, t.dim(), tuple(sizes), t.is_conj(), t.is_neg()


def open_sizes(leaves: PyObject) -> set[str]:
    """The free sizes in the shapes and strides of tensors, and among numbers, by name."""
    found: set[Any] = set()
    for leaf in pytree.tree_leaves(leaves):
        sizes = (*leaf.shape, *leaf.stride(), leaf.storage_offset()) if isinstance(leaf, Tensor) else (leaf,)
        found |= {symbol for n in sizes if isinstance(n, torch.SymInt) for symbol in free_symbols(n)}
    return {str(symbol) for symbol in found}


def _unbacked(tensors: Sequence[Tensor]) -> bool:
    """Whether a size depends on data."""
    return any(free_unbacked_symbols(t) for t in tensors)


def more_than_tensors(leaves: Sequence[Any], made: Sequence[Tensor], held: Sequence[Tensor]) -> str:
    """Why a result cannot be given by a stamp; "" where it can."""
    if not made or not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return "it returns something else than tensors"
    if any(t.layout != torch.strided for t in made) or _unbacked(made):
        return "it returns a tensor whose size depends on the data"
    memory = [t.untyped_storage()._cdata for t in (*made, *held) if t.layout == torch.strided]
    if len({*memory[: len(made)]}) < len(made) or {*memory[: len(made)]} & {*memory[len(made) :]}:
        return "it returns a view"
    return ""


def attributes(layer: nn.Module) -> list[tuple[Any, ...]]:
    """Every attribute of a layer's modules, and the length of those that are containers."""
    tables = ("_parameters", "_buffers", "_modules")
    return [
        (at, name, value, len(value) if isinstance(value, CONTAINERS) else 0)
        for at, module in enumerate(layer.modules())
        for name, value in (
            *((n, v) for n, v in module.__dict__.items() if n not in tables),
            *((n, v) for table in tables for n, v in module.__dict__[table].items()),
        )
    ]


def same_attributes(before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]) -> bool:
    return len(before) == len(after) and all(
        a[:2] == b[:2] and a[2] is b[2] and a[3] == b[3] for a, b in zip(before, after, strict=True)
    )
