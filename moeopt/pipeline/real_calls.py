"""What each module of interest is called with when the model runs, and whether it is then what it is at rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from moeopt.capture.isolated_run import run_quietly
from moeopt.capture.tape import clone_inputs
from moeopt.capture.tree import ArgsKwargs
from moeopt.value_types import PyObject


def real_calls(model: nn.Module, call: ArgsKwargs, paths: set[str]) -> tuple[dict[str, ArgsKwargs], dict[str, str]]:
    """The first real call of each module in ``paths``, and for those that were changed around it the reason to decline.

    Adapter libraries register a parametrization on a module before each call and remove it afterwards: a probe call of
    that module alone would show another function than the model computes.
    """
    calls: dict[str, ArgsKwargs] = {}
    changed: dict[str, str] = {}
    handles = []

    def keep(path: str, rest: list[Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: PyObject, kwargs: PyObject) -> None:
            if path not in calls:
                calls[path] = clone_inputs((tuple(args), dict(kwargs)))
                if _parts(module) != rest:
                    changed[path] = _words(module, rest)

        return hook

    for path in paths:
        if not path.startswith("<"):
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(keep(path, _parts(module)), with_kwargs=True))
    try:
        run_quietly(model, *call)
    finally:
        for handle in handles:
            handle.remove()
    return calls, changed


def _parts(module: nn.Module) -> list[Any]:
    """The classes and Parameters of a module and all in it."""
    return [part for m in module.modules() for part in (type(m), *map(id, m._parameters.values()))]


def _words(module: nn.Module, rest: list[Any]) -> str:
    added = next((m for m in module.modules() if type(m) not in rest), None)
    what = f" (it holds a {type(added).__name__})" if added is not None else ""
    return (
        f"code around it changes its weights or its class before each call and back afterwards{what}, as adapters on "
        "stacked Parameters do, so that alone it is another function than in the model; merge the adapters into the "
        "weights (merge_and_unload()), or leave the block as it is"
    )
