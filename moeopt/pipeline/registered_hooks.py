"""The forward hooks that are registered on a block itself: they run around its rewritten forward as before.

So the forward is read without them. A forward that does not run without them, because one of the hooks stores what the
forward reads, is declined with that reason. So is a block with a hook on one of its experts that changes the result:
read by values, the hook would be taken for a part of the expert's function.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from moeopt.capture.failed_call import in_short
from moeopt.capture.isolated_run import run_quietly
from moeopt.capture.tree import ArgsKwargs, leaves_of
from moeopt.errors import CaptureError
from moeopt.listed import listed
from moeopt.recognise.named_obstacles import alike_children, computed_weight
from moeopt.rewrite.legality import hook_reason
from moeopt.value_types import PyObject

_TABLES = ("_forward_pre_hooks", "_forward_hooks")


@contextlib.contextmanager
def without_own_hooks(module: nn.Module) -> Iterator[None]:
    """While open, ``module`` has no forward hooks; those of the modules in it stay."""
    held = {name: module.__dict__[name] for name in _TABLES}
    module.__dict__.update({name: OrderedDict() for name in _TABLES})
    try:
        yield
    finally:
        module.__dict__.update(held)


def needs_own_hooks(module: nn.Module, call: ArgsKwargs) -> str:
    """Why the forward of ``module`` does not run without its hooks, in a sentence; "" where it runs, or has no hooks.

    Args:
        call: the arguments after the forward pre-hooks.
    """
    hooks = [hook for name in _TABLES for hook in module.__dict__[name].values()]
    if not hooks:
        return ""
    with without_own_hooks(module):
        error = _error(module, call)
    if error is None or _error(module, call) is not None:
        return ""
    return (
        f"its forward reads what its own hook {listed(map(_name, hooks))} stores before each call, and does not run "
        f"without it ({in_short(error)}), so that it is no function of its arguments; compute that in forward, or pass "
        "it as an argument"
    )


def changing_hook_reason(module: nn.Module, call: ArgsKwargs) -> str:
    """Why a block is declined because a hook inside one of its experts changes the block's result; "" where none does.

    A hook that changes nothing is declined later, by the part of the rewrite that it stands in the way of.

    Args:
        call: the arguments after the forward pre-hooks of ``module``.
    """
    experts = {part for child in alike_children(module) for part in child.modules()}
    hooked = {
        path: part
        for path, part in module.named_modules()
        if part in experts and any(part.__dict__[name] for name in _TABLES)
    }
    if not hooked:
        return ""
    try:
        with without_own_hooks(module):
            results = [run_quietly(module, *call)]
            for part in hooked.values():
                with without_own_hooks(part):
                    results.append(run_quietly(module, *call))
    except CaptureError:
        return ""
    first, *others = ([t.nan_to_num() for t in leaves_of(torch.Tensor, result)] for result in results)
    for path, other in zip(hooked, others, strict=True):
        if len(first) != len(other) or not all(map(torch.equal, first, other)):
            return computed_weight(path, hooked[path]) or hook_reason(path)
    return ""


def _error(module: nn.Module, call: ArgsKwargs) -> BaseException | None:
    try:
        run_quietly(module, *call)
    except CaptureError as err:
        return err.__cause__ or err
    return None


def _name(hook: PyObject) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    function: Callable[..., Any] | None = getattr(hook, "__func__", hook)
    return str(getattr(function, "__qualname__", type(hook).__name__))
