"""Copies of a rewritten module.

    other = copy.copy(block)     shares what the block holds, its forward too; nn.DataParallel makes such copies
    other.top_k = 1              and the forward reads the block's

PyTorch calls ``self.forward``, and nothing tells the forward which module is called. But each shallow copy refers to
the forward, so where more than one module and the forward's own parts refer to it, the called module is looked up.

An fx.GraphModule copies itself from its graph: a deep copy has no other attributes than those that its ``meta`` names.
"""

from __future__ import annotations

import sys
import types

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from moeopt.value_types import PyObject

_CALL = nn.Module._call_impl.__code__
_CALLS = {_CALL, *(part for part in _CALL.co_consts if isinstance(part, types.CodeType))}
"""The code by which a module calls its forward: without hooks, and with them."""


class _Counted:
    def __call__(self) -> int:
        return sys.getrefcount(self)


def _references() -> int:
    """How many references a forward has that is called by the one module that holds it."""
    module = nn.Module()
    module.__dict__["forward"] = _Counted()
    return int(module())


REFERENCES = _references()


def shallow_copy_of(module: nn.Module) -> PyObject:
    """The module whose forward was called, by PyTorch, where that is another than ``module``; None where it is not.

    It is for a forward to ask.
    """
    frame = sys._getframe(2)
    caller = frame.f_locals.get("self") if frame.f_code in _CALLS else None
    return None if caller is module else caller


def keep_in_copies(module: nn.Module, forward: PyObject) -> None:
    """Have deep copies of an fx.GraphModule keep the ``forward`` put on it; None: no longer. Other modules do so."""
    if not isinstance(module, fx.GraphModule):
        return
    kept = dict(module.meta.pop(_USER_PRESERVED_ATTRIBUTES_KEY, {}))
    kept.pop("forward", None)
    if forward is not None:
        kept["forward"] = forward
    if kept:
        module.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = kept
