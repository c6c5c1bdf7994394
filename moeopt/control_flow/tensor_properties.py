"""Code that reads properties of tensors that no graph holds: storage offset, class, version, autograd history.

The guard of a call compares dtypes and shapes with those that were verified. A factor that is 2 where
``x.storage_offset()`` is 0 is in no graph. So a block whose code names such a property is run on tensors of the same
values for which the property differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.tree import ArgsKwargs, tree_map
from moeopt.control_flow.requires_grad_reads import requires_grad_decides
from moeopt.rewrite.reads import Reads
from moeopt.value_types import PyObject
from moeopt.verification.few_tokens import unlike
from moeopt.verification.results import Case

MakeSpecial = Callable[[Tensor], Tensor]


def _offset_view(t: Tensor) -> Tensor:
    """A view into the middle of a larger storage."""
    return torch.cat([torch.zeros(1, dtype=t.dtype, device=t.device), t.flatten(), t.flatten()])[
        1 : t.numel() + 1
    ].view(t.shape)


def _written(t: Tensor) -> Tensor:
    new = t.clone()
    return new.copy_(t)


def _of_inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _computed(t: Tensor) -> Tensor:
    """A result that autograd recorded, with a hook and a retained gradient."""
    with torch.enable_grad():
        new = t.clone().requires_grad_() * 1
        new.retain_grad()
        new.register_hook(lambda gradient: gradient)
    return new


def _with_gradient(t: Tensor) -> Tensor:
    new = t.clone().requires_grad_()
    new.grad = torch.zeros_like(t)
    return new


def _of_floats(make: MakeSpecial) -> MakeSpecial:
    return lambda t: make(t) if t.is_floating_point() else t


def _first_repeated(t: Tensor) -> Tensor:
    """The first row repeated, with stride 0 along the first dimension."""
    return t[:1].expand_as(t) if t.dim() else t


_STORAGE = ("storage_offset", "data_ptr", "untyped_storage", "storage", "nbytes", "_base", "_is_view")
_PROPERTIES: tuple[tuple[tuple[str, ...], MakeSpecial], ...] = (
    (_STORAGE, _offset_view),
    (("Parameter", "type", "__class__"), lambda t: nn.Parameter(t.clone(), requires_grad=False)),
    (("_version",), _written),
    (("is_inference",), _of_inference),
    (("is_shared",), lambda t: t.clone().share_memory_()),
    (("grad_fn", "is_leaf", "requires_grad", "retains_grad", "_backward_hooks"), _of_floats(_computed)),
    (("grad",), _of_floats(_with_gradient)),
    (("stride",), _first_repeated),
)


def property_decides(module: nn.Module, original: Callable[..., Any], call: ArgsKwargs, reads: Reads | None) -> str:
    """Why a property of its tensors changes the outputs of ``module``; "" where none does."""
    return requires_grad_decides(module, original, call, reads) or argument_decides(module, original, call, reads)


def argument_decides(module: nn.Module, original: Callable[..., Any], call: ArgsKwargs, reads: Reads | None) -> str:
    """Why ``module`` has other outputs for tensors of the same values, in a sentence; "" where it has not."""
    for names, make in _PROPERTIES:
        asked = [name for name in names if reads is not None and name in reads.names]
        if asked and make is _first_repeated:  # stride 0 makes rows equal: compare with equal rows that are copied
            call = tree_map(Tensor, lambda t: _first_repeated(t).clone(), call)
        if asked and _differs(original, module, call, make):
            return (
                f"its forward asks more of its input than values and shape ({' or '.join(asked)}) and computes "
                "something else where the answer is another, which the rewritten code would not follow; leave that out"
            )
    return ""


def _differs(original: Callable[..., Any], module: nn.Module, call: ArgsKwargs, make: MakeSpecial) -> bool:
    """Whether ``original`` has other outputs on the tensors that ``make`` makes from those of ``call``."""
    return bool(list(unlike(original, _Special(original, module, make), [Case("the given inputs", *call)])))


class _Special:
    """``original``, a call of ``module``, on the tensors that ``make`` makes, or on the given ones if it refuses."""

    def __init__(self, original: Callable[..., Any], module: nn.Module, make: MakeSpecial) -> None:
        self.original, self.module, self.make = original, module, make

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        try:
            special_args, special_kwargs = tree_map(Tensor, self.make, (args, kwargs))
            return self.original(*special_args, **special_kwargs)
        except Exception:
            return self.original(*args, **kwargs)
