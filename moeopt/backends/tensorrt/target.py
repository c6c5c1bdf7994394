"""What an engine is built for: one compute capability, and the TensorRT package that builds for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from moeopt.backends.tensorrt.product import REGULAR, RTX
from moeopt.errors import UsageError
from moeopt.value_types import PyObject

RTX_BUILDS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT for RTX 1.7 builds for, with no GPU (``trt.ComputeCapability``)."""
GPU_BUILDS = (90, 100, 103, 110)
"""Those that TensorRT alone builds for, on a GPU of that capability."""


@dataclass(frozen=True)
class Target:
    """A compute capability.

    Attributes:
        sm: as one number, 89 for 8.9.
        name: "sm_89".
        product: the package that builds for it, "tensorrt_rtx" or "tensorrt".
    """

    sm: int
    name: str
    product: str

    def __str__(self) -> str:
        return self.name


def parse_target(text: PyObject) -> Target:
    """``Target`` from "sm_89", "sm89", "8.9" or 89; ``UsageError`` for any other, with the list of those known."""
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})(\.?)(\d)", str(text).strip().lower())
    sm = int(found.group(1) + found.group(3)) if found else 0
    if sm not in RTX_BUILDS + GPU_BUILDS:
        raise UsageError(
            f"target {text!r} is not a compute capability that TensorRT builds for; the targets are "
            f"{', '.join(f'sm_{n}' for n in RTX_BUILDS)} (TensorRT for RTX, built on any machine) and "
            f"{', '.join(f'sm_{n}' for n in GPU_BUILDS)} (TensorRT, on such a GPU)"
        )
    return Target(sm, f"sm_{sm}", RTX if sm in RTX_BUILDS else REGULAR)


def local_target() -> Target | None:
    """The target of the GPU in this machine; None where there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return parse_target(f"{major}.{minor}")


def wanted_target(text: PyObject) -> Target:
    """The target that was asked for, else this machine's GPU; ``UsageError`` where neither says it."""
    if text is not None:
        return parse_target(text)
    here = local_target()
    if here is None:
        raise UsageError(
            "backend 'tensorrt' builds for one compute capability, and this machine has no GPU to take it from: "
            f"give target=, one of {', '.join(f'sm_{n}' for n in RTX_BUILDS)}"
        )
    return here


def check_buildable(target: Target) -> None:
    """``UsageError`` where no engine for ``target`` can be built on this machine."""
    here = local_target()
    if target.product == REGULAR and (here is None or here.sm != target.sm):
        gpu = "no GPU" if here is None else f"a GPU of {here.name}"
        raise UsageError(
            f"TensorRT builds engines for {target.name} on a GPU of that capability only, and this machine has {gpu}: "
            f"run this there, or take a target that TensorRT for RTX builds for: "
            f"{', '.join(f'sm_{n}' for n in RTX_BUILDS)}"
        )
