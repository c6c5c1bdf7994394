"""Rounding noise: a model's own modules, each result off by about one eps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeopt.value_types import PyObject


class Noise:
    """Forward hooks that multiply the named submodules' floating outputs by 1 + eps * normal.

    With ``terms``, so are the inputs of those that multiply by a matrix or a kernel of their own.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], seed: int, terms: bool = False) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._modules = [modules[name] for name in names]
        self._seed, self._terms = seed, terms
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        generator = torch.Generator().manual_seed(self._seed)

        def shake(t: Tensor) -> Tensor:
            if not t.dtype.is_floating_point or torch._C._functorch.is_functorch_wrapped_tensor(t):
                return t  # under vmap nothing may be drawn
            noise = torch.randn(t.shape, generator=generator).to(t.device)
            return (t.float() * (1 + torch.finfo(t.dtype).eps * noise)).to(t.dtype)

        def hook(module: nn.Module, inputs: PyObject, output: PyObject) -> PyObject:
            return pytree.tree_map_only(Tensor, shake, output)

        def before(module: nn.Module, inputs: PyObject) -> PyObject:
            return pytree.tree_map_only(Tensor, shake, inputs)

        self._handles = [module.register_forward_hook(hook) for module in self._modules]
        products = [m for m in self._modules if self._terms and any(p.dim() > 1 for p in m.parameters(recurse=False))]
        self._handles += [module.register_forward_pre_hook(before) for module in products]

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
