"""Rounding noise: a model's own modules, each result off by about one eps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.value_types import PyObject


class Noise:
    """Forward hooks that multiply the named submodules' floating outputs by 1 + eps * normal.

    With ``inside``, so are the inputs of those that multiply by a matrix or a kernel of their own, and whatever is cast
    to a narrower dtype, by the eps of that dtype.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], seed: int, inside: bool = False) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._modules = [modules[name] for name in names]
        self._seed, self._inside = seed, inside
        self._handles: list[Any] = []
        self._casts: _NarrowingCasts | None = None

    def __enter__(self) -> None:
        generator = torch.Generator().manual_seed(self._seed)

        def shake(t: Tensor) -> Tensor:
            if not t.dtype.is_floating_point or torch._C._functorch.is_functorch_wrapped_tensor(t):
                return t  # under vmap nothing may be drawn
            wide = t if t.dtype == torch.float64 else t.float()
            noise = torch.randn(t.shape, generator=generator).to(t.device, wide.dtype)
            return (wide * (1 + torch.finfo(t.dtype).eps * noise)).to(t.dtype)

        if self._inside:
            self._casts = _NarrowingCasts(shake)
            self._casts.__enter__()  # type: ignore[no-untyped-call]

        def hook(module: nn.Module, inputs: PyObject, output: PyObject) -> PyObject:
            return pytree.tree_map_only(Tensor, shake, output)

        def before(module: nn.Module, inputs: PyObject) -> PyObject:
            return pytree.tree_map_only(Tensor, shake, inputs)

        self._handles = [module.register_forward_hook(hook) for module in self._modules]
        products = [m for m in self._modules if self._inside and any(p.dim() > 1 for p in m.parameters(recurse=False))]
        self._handles += [module.register_forward_pre_hook(before) for module in products]

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._casts is not None:
            self._casts.__exit__(*exc)  # type: ignore[no-untyped-call]
            self._casts = None


class _NarrowingCasts(TorchDispatchMode):
    """Passes what a cast makes narrower through ``shake``."""

    def __init__(self, shake: Callable[[Tensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shake = shake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and narrows(args[0], out):
            with torch.utils._python_dispatch._disable_current_modes():
                return self._shake(out)
        return out


def narrows(before: Tensor, after: Tensor) -> bool:
    """Whether a cast rounded: floats that became floats of a larger eps."""
    if not (before.is_floating_point() and after.is_floating_point()):
        return False
    return torch.finfo(before.dtype).eps < torch.finfo(after.dtype).eps
