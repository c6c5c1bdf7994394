"""What a forward may change in its module, remembered so that a trace can undo it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _shallow(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) else value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or type(a) is not type(b):
        return False
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
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
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.named_modules())
        self._before: list[dict[str, Any]] = [
            {k: _shallow(v) for k, v in module.__dict__.items()} for _, module in self._modules
        ]
        self._own: dict[int, torch.Tensor] = {}
        for tensor in (*root.parameters(), *root.buffers()):
            if tensor.layout == torch.strided:
                self._own.setdefault(tensor.untyped_storage()._cdata, tensor)
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def about_to_write(self, target: torch.Tensor) -> None:
        """Remember the parameter or buffer whose memory ``target`` views."""
        key = target.untyped_storage()._cdata
        own = self._own.get(key)
        if own is not None and key not in self._saved:
            with torch.utils._python_dispatch._disable_current_modes():
                self._saved[key] = (own, own.detach().clone())

    def changed_attributes(self) -> dict[tuple[str, str], Any]:
        """(module path, attribute) -> new value, for each plain attribute that the run replaced."""
        changed: dict[tuple[str, str], Any] = {}
        for (path, module), before in zip(self._modules, self._before, strict=True):
            for name, value in module.__dict__.items():
                if name in _REGISTRIES:
                    for key, item in value.items():
                        if before[name].get(key) is not item:
                            changed[path, key] = item
                elif name not in before or not _same(before[name], value):
                    changed[path, name] = value
        return changed

    def restore(self) -> None:
        """Put every attribute and every written parameter or buffer back."""
        for (_, module), before in zip(self._modules, self._before, strict=True):
            now = module.__dict__
            for name in [n for n in now if n not in before]:
                del now[name]
            for name, value in before.items():
                current = now.get(name)
                if type(value) in (list, dict, set) and type(current) is type(value):
                    if not _same(current, value):
                        current.clear()
                        current.extend(value) if type(value) is list else current.update(value)
                elif name not in now or current is not value:
                    now[name] = value
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            for own, value in self._saved.values():
                own.copy_(value)
