"""What a forward may change in its module, remembered so that a trace can undo it."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import nn

from moeopt.capture.held_contents import CONTAINERS, same_items
from moeopt.capture.held_state import TABLES, HeldState
from moeopt.errors import UsageError
from moeopt.value_types import PyObject

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = TABLES - {*_REGISTRIES, "_non_persistent_buffers_set"}


def _tensors(modules: list[tuple[str, nn.Module]], table: str) -> list[tuple[str, torch.Tensor]]:
    """(path, tensor) of every Parameter or buffer, each once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, module in modules:
        for name, tensor in getattr(module, table).items():
            if tensor is not None:
                found.setdefault(id(tensor), (f"{path}.{name}" if path else name, tensor))
    return list(found.values())


def _same(a: PyObject, b: PyObject) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or type(a) is not type(b):
        return False
    if type(a) in (list, tuple):
        if len(a) != len(b):
            return False
        return all(map(is_, a, b)) or all(_same(x, y) for x, y in zip(a, b, strict=True))  # a list may be millions
    if type(a) is dict:
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    try:
        return bool(a == b)
    except Exception:  # an exotic object that cannot be compared: identity was already denied
        return False


class ModuleState:
    """A snapshot of every submodule's attributes, taken before a run.

    Tensors are copied only when the recorder announces a write to them (``about_to_write``), so a
    snapshot of a model costs no memory for its weights.

    Attributes:
        modules, parameters, buffers: of the root, each once, with their paths.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.named_modules())
        self.parameters = _tensors(self.modules, "_parameters")
        self.buffers = _tensors(self.modules, "_buffers")
        self._held = HeldState(self.modules)
        self._before = [attributes for _, attributes, _ in self._held.attributes]
        self._contents = [
            {k: self._held.held(v) for k, v in d.items() if k not in _HOOKS and type(v) in CONTAINERS}
            for d in self._before
        ]
        self._own: dict[int, torch.Tensor] = {}
        for name, tensor in (*self.parameters, *self.buffers, *self._held.tensors.items()):
            if nn.parameter.is_lazy(tensor):
                raise UsageError(
                    f"{name} has no shape yet (a lazy module); run the model once on these inputs, then optimise it"
                )
            if tensor.layout == torch.strided:
                self._own.setdefault(tensor.untyped_storage()._cdata, tensor)
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def about_to_write(self, target: torch.Tensor) -> None:
        """Remember the memory that ``target`` views, whole: tensors may be parts of it, or overlap in it."""
        key = target.untyped_storage()._cdata
        own = self._own.get(key)
        if own is not None and key not in self._saved:
            with torch.utils._python_dispatch._disable_current_modes():
                storage = own.untyped_storage()
                self._saved[key] = storage, storage.clone()

    def changed_attributes(self) -> dict[tuple[str, str], Any]:
        """(module path, attribute) -> new value, for each plain attribute that the run replaced."""
        changed: dict[tuple[str, str], Any] = {}
        for (path, module), before, contents in zip(self.modules, self._before, self._contents, strict=True):
            for name, held in contents.items():
                value = module.__dict__.get(name)
                if name in _REGISTRIES and value is not None:
                    changed |= {(path, k): v for k, v in value.items() if held.get(k) is not v}
                elif name in module.__dict__ and not _same(held, value):
                    changed[path, name] = value
            if not same_items(module.__dict__, before):
                for name, value in module.__dict__.items():
                    if name not in contents and (name not in before or not _same(before[name], value)):
                        changed[path, name] = value
        return changed

    def changed_in_place(self) -> set[tuple[str, str]]:
        """(module path, attribute) of each list, dict or other container that the run wrote into."""
        return {
            (path, name)
            for (path, _), before, contents in zip(self.modules, self._before, self._contents, strict=True)
            for name, held in contents.items()
            if name not in _REGISTRIES and not _same(held, before[name])
        }

    def restore(self) -> None:
        """Put every attribute and every written parameter or buffer back."""
        self._held.restore()
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            for storage, held in self._saved.values():
                storage.copy_(held)
