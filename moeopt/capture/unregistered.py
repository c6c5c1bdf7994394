"""Modules and tensors that a model keeps in plain Python lists, tuples, dicts and objects, where PyTorch does not see
them.

``.parameters()``, ``.to()`` and ``state_dict()`` do not hold them, and no path leads to them, so nothing can be
rewritten to read them. They run, though, so the report has to name them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeopt.value_types import PyObject

_MARK = "[plain]"
_MOST = 4096
"""Elements of one container that are looked at: more are data."""
_HEAP_TYPE = 1 << 9
"""The flag of classes that Python code made (``Py_TPFLAGS_HEAPTYPE``)."""


@dataclass
class HeldOutside:
    """What one attribute holds: modules and tensors by their keys in it; ``tensors`` are those in modules as well."""

    owner: nn.Module
    name: str
    kind: str
    items: dict[str, Any]
    tensors: list[torch.Tensor]

    @property
    def reason(self) -> str:
        """Why experts in it cannot be rewritten, and the way out."""
        kind = "Module" if any(isinstance(v, nn.Module) for v in self.items.values()) else "Parameter"
        form = {
            "dict": f"an nn.{kind}Dict", "attribute": "an attribute that is assigned (self.name = ...)",
            "object": "an nn.Module of its own",
        }  # fmt: skip
        return (
            f"its weights are in a plain Python {self.kind} (self.{self.name} of {type(self.owner).__name__}), which "
            ".parameters(), .to(), .eval() and state_dict() do not see, so a rewritten block could not follow them; "
            f"keep them in {form.get(self.kind, f'an nn.{kind}List')} and optimise again"
        )


def unregistered(model: nn.Module, *, objects: bool = False) -> list[HeldOutside]:
    """What the modules of ``model`` hold in plain containers, and is registered nowhere in it.

    Args:
        objects: whether objects of Python classes are looked into too; what they hold may be state of their own.
    """
    modules = list(model.named_modules())
    known = {id(m) for _, m in modules} | {id(t) for t in (*model.parameters(), *model.buffers())}
    found, seen = [], set[int]()
    for _, module in modules:
        for name, value in module.__dict__.items():
            plain = objects and _is_object(value)
            if not plain and (not isinstance(value, (list, tuple, dict, nn.Module)) or not value) or _is_torchs(name):
                continue
            into = seen if objects else None
            items = {k: v for k, v in _items(value, "", 4, into) if id(v) not in known and not _holds(v, module)}
            parts = [t for v in items.values() for t in _tensors(v) if id(t) not in known]
            if parts:
                kind = "attribute" if isinstance(value, nn.Module) else "object" if plain else type(value).__name__
                found.append(HeldOutside(module, name, kind, items, parts))
    return found


def _is_object(value: PyObject) -> bool:
    """Whether it is an instance of a class of Python code that is no tensor, module or container."""
    if isinstance(value, (torch.Tensor, nn.Module, list, tuple, dict, type)):
        return False
    return bool(type(value).__flags__ & _HEAP_TYPE) and isinstance(getattr(value, "__dict__", None), dict)


def _tensors(value: PyObject) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [*value.parameters(), *value.buffers()]


def _holds(value: PyObject, module: nn.Module) -> bool:
    """True for a way back up: a module that ``module`` is a part of."""
    return isinstance(value, nn.Module) and any(m is module for m in value.modules())


def _is_torchs(name: str) -> bool:
    return name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set") or "_hooks" in name


def _items(value: PyObject, key: str, depth: int, seen: set[int] | None) -> Iterator[tuple[str, Any]]:
    """The modules and tensors in ``value`` by their keys; ``seen`` gets the objects that were looked into, unless None:
    then none are."""
    if isinstance(value, (torch.Tensor, nn.Module)):
        yield key, value
        return
    if seen is not None and _is_object(value) and id(value) not in seen:
        seen.add(id(value))
        value = vars(value)
    if type(value) in (list, tuple, dict) and depth and len(value) <= _MOST:
        pairs = list(value.items()) if type(value) is dict else enumerate(value)
        for name, item in pairs:
            yield from _items(item, f"{key}_{name}".replace(".", "_").lstrip("_"), depth - 1, seen)


@contextlib.contextmanager
def registered(model: nn.Module, held: list[HeldOutside]) -> Iterator[None]:
    """While open, ``held`` are submodules and buffers, under names that no Python attribute hides."""
    for one in held:
        home = nn.ModuleList()
        home._modules.update({k: v for k, v in one.items.items() if isinstance(v, nn.Module)})
        home._buffers.update({k: v for k, v in one.items.items() if isinstance(v, torch.Tensor)})
        one.owner._modules[one.name + _MARK] = home
    try:
        yield
    finally:
        for one in held:
            del one.owner._modules[one.name + _MARK]


def is_registered(path: str) -> bool:
    """False for a path that leads through a plain container."""
    return _MARK not in path
