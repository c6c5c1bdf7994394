"""Models, and places to call moeopt from, in which no code or no value can be read: refused before anything is done."""

from __future__ import annotations

import torch
from torch import nn

from moeopt.errors import UsageError


def refuse_scripted(model: nn.Module) -> None:
    """``UsageError`` for TorchScript: no hook can be set on it, and a copy of it has weights of its own."""
    scripted = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise UsageError(
            f"{scripted or 'model'} is a TorchScript module, which can be neither watched nor copied with shared "
            "weights; give the Python modules, or optimise the submodule with the experts"
        )


def refuse_no_values() -> None:
    """``UsageError`` where new tensors have no values: those that moeopt makes to compare would have none either."""
    if torch.get_default_device().type == "meta":
        raise UsageError(
            "torch's default device is 'meta', where tensors have no values, so nothing could be compared: call moeopt "
            "outside of `with torch.device('meta')`, or after torch.set_default_device(None)"
        )
