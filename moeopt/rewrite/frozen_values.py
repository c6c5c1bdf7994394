"""A tensor whose values became part of the rewritten code: is it still what it was?

A mask over neurons, a placement of experts, a scale that Python read with ``.item()``: the rewritten code
holds what they decided and does not read them. Each is compared with a copy before a call, by identity and
version where that tells that nothing wrote to it; small ones on the CPU always by value, since a write
through ``.data`` leaves no version behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_ALWAYS = 64
"""Elements up to which a tensor on the CPU is compared at each call; which costs little."""


class Frozen:
    """One tensor of ``root`` and the value that it had."""

    __slots__ = ("parents", "key", "path", "root", "seen", "value")

    def __init__(self, root: nn.Module, path: str, value: Tensor) -> None:
        *self.parents, self.key = path.split(".")
        self.root, self.path, self.value = root, path, value
        self.seen: tuple[Any, ...] | None = None

    def changed(self) -> str:
        """What is not as it was verified, or "". Fake and other subclass tensors have no values: they are not asked."""
        tensor = self._tensor()
        if tensor is None:
            return f"{self.path} decides what the block computes and was removed"
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_meta:
            return ""
        always = tensor.is_inference() or (tensor.numel() <= _ALWAYS and tensor.device.type == "cpu")
        seen = None if always else (id(tensor), tensor._version, tensor.data_ptr())
        if seen is not None and seen == self.seen:
            return ""
        if not self._equal(tensor):
            return f"{self.path} decides what the block computes and is not what was verified"
        self.seen = seen
        return ""

    def _tensor(self) -> Tensor | None:
        module = self.root
        for name in self.parents:
            child = module._modules.get(name)
            if child is None:
                return None
            module = child
        for registry in (module._parameters, module._buffers, module.__dict__):
            if isinstance(found := registry.get(self.key), Tensor):
                return found
        return None

    def _equal(self, tensor: Tensor) -> bool:
        """Equal values; in a trace, which must not see the comparison, as well."""
        value = self.value
        if tensor.dtype is not value.dtype or tensor.shape != value.shape:
            return False
        with _disable_current_modes(), torch.no_grad():
            return torch.equal(tensor, value.to(tensor.device))
