"""torch's table of ONNX translations, made once in a process instead of for every export.

Making it reads the signatures of some thousand functions, which takes about a second; each export gets a copy, because
an export adds its own translations to it. Ops that were registered meanwhile make it anew: only known ones are in it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

_NAME = "from_torchlib"
_made: dict[Any, Any] = {}


@contextlib.contextmanager
def one_registry() -> Iterator[None]:
    """While open, exports start from copies of one table; does nothing if torch's exporter is built otherwise."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        theirs = vars(ONNXRegistry)[_NAME]
        fits = isinstance(ONNXRegistry().functions, dict)
    except (ImportError, KeyError, AttributeError):  # private names of another version: slower, with the same result
        fits = False
    if not fits:
        yield
        return

    def from_torchlib(cls: Any, *args: Any, **kwargs: Any) -> Any:
        known = len(torch._C._dispatch_get_all_op_names())
        key = (cls, args, tuple(sorted(kwargs.items())), known)
        if key not in _made:
            _made[key] = theirs.__func__(cls, *args, **kwargs)
        table = copy.copy(_made[key])
        table.functions = {target: list(found) for target, found in table.functions.items()}
        return table

    setattr(ONNXRegistry, _NAME, classmethod(from_torchlib))
    try:
        yield
    finally:
        setattr(ONNXRegistry, _NAME, theirs)
