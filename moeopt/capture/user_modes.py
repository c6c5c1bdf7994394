"""Modes of PyTorch that are active at a call and see, or change, each op that it makes.

A user's ``TorchFunctionMode`` or ``TorchDispatchMode`` may count, log or replace ops. A rewritten block makes other ops
than the block's own code, so under such a mode its own code runs. No user's modes are: moeopt's own; a default device
(``with torch.device(...)``); what PyTorch traces with (fake tensors, proxies); selective checkpointing, which keeps
results and changes none.
"""

from __future__ import annotations

from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from moeopt.value_types import PyObject

_NO_USERS = ("moeopt.", "torch.fx.", "torch.utils.checkpoint")
"""How the modules begin whose modes are no user's."""


def active_user_mode() -> str:
    """The class name of the innermost user's mode that is active in this thread; "" where there is none."""
    modes: list[PyObject] = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return next((type(mode).__name__ for mode in reversed(modes) if not _harmless(mode)), "")


def _harmless(mode: PyObject) -> bool:
    if isinstance(mode, DeviceContext) or (isinstance(mode, TorchDispatchMode) and mode.is_infra_mode()):
        return True
    return type(mode).__module__.startswith(_NO_USERS)
