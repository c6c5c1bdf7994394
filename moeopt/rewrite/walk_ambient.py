"""State that belongs to the thread, the context or the process, and that a block's code reads by a call.

A context variable has a value in each context, a ``threading.local`` a table in each thread; PyTorch has a default
dtype and a few modes. Each is noted with its value where the walk runs, and its term asks for the value at each call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from moeopt.options import variables
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from moeopt.rewrite.walk import Walk

_DTYPE = "get_default_dtype"
_ASKED: dict[PyObject, tuple[str, ...]] = {
    torch: (
        "is_inference_mode_enabled", "are_deterministic_algorithms_enabled", "get_deterministic_debug_mode",
        "is_deterministic_algorithms_warn_only_enabled", "get_float32_matmul_precision", "get_default_device",
        "get_num_threads", "get_num_interop_threads", "initial_seed", "is_anomaly_enabled",
    ),
    torch.distributed: ("is_initialized", "get_rank", "get_world_size"),
    threading: ("current_thread", "get_ident"),
}  # fmt: skip
"""Functions without arguments by which code asks for a mode, or where it runs. Gradient mode and autocast are the call
guard's."""
_BACKENDS = {
    "torch.backends.mkldnn": torch.backends.mkldnn, "torch.backends.cudnn": torch.backends.cudnn,
    "torch.backends.cuda.matmul": torch.backends.cuda.matmul,
}  # fmt: skip
_FLAGS = frozenset(("enabled", "deterministic", "benchmark", "allow_tf32"))
_UNSET = object()


def read_context(walk: Walk, place: str, value: ContextVar[PyObject]) -> None:
    """A context variable: the value that it has here, its own default included."""
    walk.note(place, "context variable", value.name)
    held = value.get(_UNSET)
    walk.probe.add("{0}.get({1}) is {2}", value, _UNSET, held)
    if held is _UNSET:
        try:
            held = value.get()
        except LookupError:  # neither set nor with a default
            return
    walk.visit(f"{place}.get()", held)


def read_modes(walk: Walk) -> None:
    """PyTorch's default dtype, which tensors made without a dtype have, and the modes that the code asks for."""
    named = [(holder, name) for holder, names in _ASKED.items() for name in names if name in walk.names]
    for holder, name in ((torch, _DTYPE), *named):
        try:
            ask = getattr(holder, name)
            value = ask()
        except Exception:  # not in this build, or of a group of processes that there is not
            continue
        walk.probe.add("{0}() == {1}", ask, value)
        walk.visit(f"{holder.__name__}.{name}()", value.name if isinstance(value, threading.Thread) else value)
    for place, holder in _BACKENDS.items() if "backends" in walk.names else ():
        for name in walk.names & _FLAGS:
            if hasattr(holder, name):
                walk.probe.attribute(holder, name, getattr(holder, name))
                walk.visit(f"{place}.{name}", getattr(holder, name))


def read_variables(walk: Walk) -> None:
    """The variables of the process that the code names, and that no other was added."""
    table, keys = variables(walk.names)
    if table:
        walk.probe.keys(table)
    for name, key in keys.items():
        walk.link(walk.probe, table, key, table[key], f"the variable {name}")


def bare_lookup(cls: type) -> Callable[[PyObject, str], PyObject]:
    """The lookup that runs no code of the user's; that of a ``threading.local`` gives the table of this thread."""
    return threading.local.__getattribute__ if issubclass(cls, threading.local) else object.__getattribute__
