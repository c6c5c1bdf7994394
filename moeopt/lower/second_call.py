"""A model that returns something else at a second call of the same inputs: it keeps a state, and a graph keeps none.

Only two calls one after the other show that. Every other run of a model puts back what the run before has left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeopt.ops.override import default_impl
from moeopt.value_types import PyObject
from moeopt.verification.model import run_plain
from moeopt.verification.state import clone_inputs_and_objects

RTOL = 1e-3
"""Of an output's largest number: what kernels may differ by between two calls, and no state that matters."""


def differs_at_second_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``model`` returns other numbers when it is called again, with the same random numbers.

    A model that cannot be run here twice is not known to differ.
    """
    try:
        with default_impl():
            first, second = run_plain(_Twice(model), args, kwargs)
    except Exception:  # of the model's own; who exports it is told by the trace
        return False
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=False)
    return any(_differ(a, b) for a, b in pairs)


class _Twice(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: PyObject, **kwargs: PyObject) -> tuple[Any, Any]:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            first = self.model(*clone_inputs_and_objects(args), **clone_inputs_and_objects(kwargs))
        return first, self.model(*args, **kwargs)


def _differ(a: PyObject, b: PyObject) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) in (int, float, bool) and type(b) is type(a) and a == a and a != b
    if a.is_meta or b.is_meta or a.layout != torch.strided:
        return False
    if a.shape != b.shape:
        return True
    if not a.dtype.is_floating_point and not a.dtype.is_complex:
        return not torch.equal(a, b)
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    one, other = a.detach().to(wide).nan_to_num(), b.detach().to(wide).nan_to_num()
    return bool(one.numel() and (one - other).abs().max() > RTOL * one.abs().max())
