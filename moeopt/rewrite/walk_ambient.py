"""State that belongs to the thread, the context or the process, and that a block's code reads by a call.

A context variable has a value in each context, a ``threading.local`` a table in each thread; PyTorch has a default
dtype and a few modes. Each is noted with its value where the walk runs, and its term asks for the value at each call.
"""

from __future__ import annotations

import decimal
import gc
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

import numpy as np
import torch

from moeopt.options import ASKED_WITH, variables
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from moeopt.rewrite.walk import Walk

_DTYPE = "get_default_dtype"
_ASKED: dict[PyObject, tuple[str, ...]] = {
    torch: (
        "is_inference_mode_enabled", "are_deterministic_algorithms_enabled", "get_deterministic_debug_mode",
        "is_deterministic_algorithms_warn_only_enabled", "get_float32_matmul_precision", "get_default_device",
        "get_num_threads", "get_num_interop_threads", "initial_seed", "is_anomaly_enabled",
        "is_autocast_cache_enabled", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype",
    ),
    torch.distributed: ("is_initialized", "get_rank", "get_world_size"),
    threading: ("current_thread", "get_ident", "active_count"),
    gc: ("isenabled",),
    os: ("getcwd", "getpid"),
    np: ("geterr", "get_printoptions"),
}  # fmt: skip
"""Functions without arguments by which code asks for a mode, or where it runs. Gradient mode and autocast are the call
guard's."""
_ASKED_OF_DEVICES = ("get_autocast_dtype", "is_autocast_enabled")
_DEVICES = ("cuda", "hpu", "mps", "mtia", "xpu")
_OF_PYTHON = ("argv", "flags")
_LEVELS = frozenset(("isEnabledFor", "getEffectiveLevel"))
_LEVEL_OF = ("level", "disabled")
"""Attributes that other objects have too."""
_WORD = re.compile(r"\w+")
_DECIMALS = frozenset(("Decimal", "getcontext"))
_BACKENDS = "torch.backends"
_UNSET = object()


def read_ambient(walk: Walk, place: str, value: ContextVar[PyObject] | logging.Logger) -> None:
    """What is another in each context, or for each level of what is logged."""
    if isinstance(value, logging.Logger):
        _logger(walk, place, value)
    else:
        _context(walk, place, value)


def read_library(walk: Walk, module: types.ModuleType) -> None:
    """The state of a module of Python's or PyTorch's that the code holds."""
    if module.__name__ == _BACKENDS:
        _backends(walk)
    elif module.__name__.startswith(_BACKENDS):
        _backend(walk, module.__name__, module)


def _context(walk: Walk, place: str, value: ContextVar[PyObject]) -> None:
    """A context variable: the value that it has here, its own default included."""
    walk.note(place, "context variable", value.name)
    held = value.get(_UNSET)
    walk.guard.add("{0}.get({1}) is {2}", value, _UNSET, held)
    if held is _UNSET:
        try:
            held = value.get()
        except LookupError:  # neither set nor with a default
            return
    walk.visit(f"{place}.get()", held)


def read_modes(walk: Walk) -> None:
    """PyTorch's default dtype, which tensors made without a dtype have, and the modes that the code asks for."""
    for holder, name in ((torch, _DTYPE), *((h, n) for h, names in _ASKED.items() for n in names if n in walk.names)):
        _ask(walk, f"{holder.__name__}.{name}", getattr(holder, name, None))
    for name in _ASKED_OF_DEVICES:
        for device in ("cpu", *(d for d in _DEVICES if d in walk.names)) if name in walk.names else ():
            _ask(walk, f"torch.{name}", getattr(torch, name, None), device)
    for name in _OF_PYTHON if "sys" in walk.names else ():
        if name in walk.names:
            walk.guard.attribute(sys, name, getattr(sys, name))
            walk.visit(f"sys.{name}", getattr(sys, name))
    if walk.names & _DECIMALS:
        walk.guard.add("({0}().prec, {0}().rounding) == {1}", decimal.getcontext, _decimals())
        walk.note("decimal.getcontext()", "context", "{} digits, {}".format(*_decimals()))
    wanted = walk.ran.variables | (walk.names if walk.names & ASKED_WITH else frozenset())
    if wanted:  # those that are named where no recorded call came: in a branch of other sizes, or of another mode
        _variables(walk, wanted)
    if "getLogger" in walk.names:
        named = (logging.root.manager.loggerDict.get(name) for name in (*walk.names, *dict(walk.ran.globals)))
        for logger in (logging.root, *named):
            if isinstance(logger, logging.Logger):
                _logger(walk, f"the logger {logger.name}", logger)
    if "backends" in walk.names:
        _backends(walk)


def _decimals() -> tuple[int, str]:
    context = decimal.getcontext()
    return context.prec, context.rounding


def _ask(walk: Walk, place: str, ask: Callable[..., PyObject] | None, *of: str) -> None:
    """What ``ask(*of)`` answers, now and at each call."""
    try:
        value = ask(*of)  # type: ignore[misc]  # None and others raise
    except Exception:  # not in this build, or of a group of processes that there is not
        return
    place = f"{place}({', '.join(map(repr, of))})"
    walk.guard.add("{0}({2}) == {1}" if of else "{0}() == {1}", ask, value, *of)
    if isinstance(value, dict):
        walk.note(place, "dict", repr(value))
    else:
        walk.visit(place, value.name if isinstance(value, threading.Thread) else value)


def _logger(walk: Walk, place: str, logger: logging.Logger) -> None:
    """What a logger lets through, where the code asks for that."""
    walk.note(place, "logger", logger.name)
    holders = ("", *_WORD.findall(place))
    if walk.names & _LEVELS or any((holder, asked) in walk.ran.reads for holder in holders for asked in _LEVEL_OF):
        lets = logger.getEffectiveLevel(), logger.manager.disable, logger.disabled
        asked = logger.getEffectiveLevel, logger.manager, logger
        walk.guard.add("({0}(), {1}.disable, {2}.disabled) == {3}", *asked, lets)
        walk.note(f"{place}.level", "level", "{}, all below {} disabled, disabled: {}".format(*lets))


def _backends(walk: Walk) -> None:
    for name in sorted(walk.names):
        if (module := sys.modules.get(f"{_BACKENDS}.{name}")) is not None:
            _backend(walk, f"{_BACKENDS}.{name}", module)


def _backend(walk: Walk, place: str, holder: PyObject, depth: int = 2) -> None:
    """The flags of a module of ``torch.backends`` that the code names, and of the objects in it."""
    for name in sorted(walk.names):
        try:
            value = getattr(holder, name)
        except Exception:  # it has no such flag, or not in this build
            continue
        if type(value) in (bool, int, float, str):
            walk.guard.add(f"{{0}}.{name} == {{1}}", holder, value)
            walk.visit(f"{place}.{name}", value)
        elif isinstance(value, types.FunctionType) and name.endswith("_enabled"):
            _ask(walk, f"{place}.{name}", value)
        elif depth and type(value).__module__.startswith(_BACKENDS):
            _backend(walk, f"{place}.{name}", value, depth - 1)


def _variables(walk: Walk, names: frozenset[str]) -> None:
    """Those of ``names`` that are variables of the process, and that no other was added."""
    table, keys = variables(names)
    walk.guard.keys(table)
    for name, key in keys.items():
        walk.link(walk.guard, table, key, table[key], f"the variable {name}")


def bare_lookup(cls: type) -> Callable[[PyObject, str], PyObject]:
    """The lookup that runs no code of the user's; that of a ``threading.local`` gives the table of this thread."""
    return threading.local.__getattribute__ if issubclass(cls, threading.local) else object.__getattribute__
