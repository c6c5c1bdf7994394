"""A backend and options, checked before a model is touched: loading and optimising may take hours."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moeopt.backends import registry
from moeopt.backends.base import Backend
from moeopt.compat import tell_untested_torch
from moeopt.options import Options, check_device
from moeopt.pipeline.chosen_passes import pass_manager


def checked_choice(backend: str, options: Options) -> tuple[Options, Backend, Any]:
    """The options with the device filled in where the engine decides it, the backend, and the backend's plan.

    Raises:
        UsageError: a pass, backend, option or device that is none, or is not on this machine; a missing package.
    """
    tell_untested_torch()
    pass_manager(options, None)  # raises where a pass is named that is none
    runtime = registry.get(backend)
    plan = runtime.plan(options)
    if options.device is None and runtime.runs_on_gpu(plan):  # the original is compared where the engine runs
        options = dataclasses.replace(options, device=torch.device("cuda"))
    check_device(options.device)
    return options, runtime, plan
