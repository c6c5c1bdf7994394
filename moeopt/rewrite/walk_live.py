"""What a block's own code reads of the submodules that it calls, which stay as they are and are followed.

    topk(self.gate(x), self.gate.top_k)            an attribute, of the module or of its class
    self.gate(x.to(self.gate.weight.dtype))        the dtype of a Parameter, or that there is one

What such a module computes is live; what the block makes of its attributes is in the rewritten code.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moeopt.capture.held_contents import foreign

if TYPE_CHECKING:
    from moeopt.rewrite.guard_expression import GuardExpression
    from moeopt.rewrite.walk import Walk

_FOLLOWED = frozenset(nn.Module().__dict__) | {"forward", "_old_forward", "_hf_hook"}
_READ = (torch.Tensor, nn.Module)
"""Read where they are."""


def read_live(walk: Walk, path: str, module: nn.Module, written: Collection[str], guard: GuardExpression) -> None:
    """The attributes of ``module`` but those ``written`` by it, and what its Parameters are."""
    held = module.__dict__
    for name in walk.mentioned(held):
        if name not in written and name not in _FOLLOWED and not isinstance(held[name], _READ):
            walk.link(guard, held, name, held[name], f"{path}.{name}")
    users = not foreign(type(module).__module__)
    if users:
        guard.keys(held)
    for owner in type(module).__mro__ if users else ():
        table = owner.__dict__ if not foreign(owner.__module__) else {}
        for name in walk.mentioned(table):
            if name not in _FOLLOWED:
                walk.link(walk.guard, table, name, table[name], f"{owner.__qualname__}.{name}")
    any_of_them = {"parameters", "dtype"} <= walk.names
    for table in (module._parameters, module._buffers):
        for name in table if any_of_them else walk.mentioned(table):
            _tensor(walk, guard, table, name, f"{path}.{name}")


def _tensor(walk: Walk, guard: GuardExpression, table: dict[str, Any], name: str, place: str) -> None:
    """Whether there is a Parameter or buffer, and of which dtype."""
    tensor = table[name]
    if tensor is None:
        guard.item(table, name, None)
        walk.note(place, "Parameter", "absent")
    else:
        guard.add("{0}[{1}].dtype is {2}", table, name, tensor.dtype)
        walk.note(f"{place}.dtype", "dtype", str(tensor.dtype))
