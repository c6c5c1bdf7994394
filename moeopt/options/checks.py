"""The values that a field of ``Options`` can take: each check raises ``UsageError``, ``as_*`` gives the kept form."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from moeopt.options.fields import Options

_SHORT_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16",
    "fp32": "float32", "f32": "float32", "float": "float32", "fp64": "float64", "f64": "float64", "double": "float64",
}  # fmt: skip


def check_numbers(options: Options) -> None:
    for name in ("tune", "inplace", "portable", "tf32"):
        if not isinstance(getattr(options, name), bool):
            raise UsageError(f"{name}={getattr(options, name)!r}: it must be True or False")
    for name, least in (("experts", 1), ("seed", 0), ("fuel", 0)):
        value = getattr(options, name)
        if value is None and name != "seed":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name}={value!r}: it must be a whole number, {least} or more")
    for name in ("build_seconds", "build_gigabytes"):
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise UsageError(f"{name}={value!r}: it must be a number above 0")


def check_dense(options: Options) -> None:
    if options.dense == "split" and options.experts is None:
        raise UsageError("dense='split' needs experts=N: into how many groups a dense FFN is split")
    if options.dense == "split" and options.experts == 1:
        raise UsageError("experts=1 leaves each dense FFN whole: give 2 or more, or dense='leave'")
    if options.dense != "split" and options.experts is not None:
        raise UsageError(f"experts={options.experts} says how to split a dense FFN: give dense='split' as well")


def as_tokens(value: PyObject) -> tuple[int, ...] | None:
    if value is None:
        return None
    counts = (value,) if isinstance(value, int) else tuple(value)
    if not counts or any(isinstance(t, bool) or not isinstance(t, int) or t < 1 for t in counts):
        raise UsageError(f"tokens={value!r}: it must be whole numbers of 1 or more, like (1, 128)")
    return counts


def as_passes(value: PyObject) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"passes={value!r}: it must be a tuple of passes, like (*moeopt.passes.PIPELINE, MyPass())")
    seen: set[str] = set()
    for one in value:
        if isinstance(one, str):
            raise UsageError(f"passes: {one!r} is a name: give the pass itself, or only_passes={one!r}")
        missing = [part for part in ("name", "level", "apply") if not hasattr(one, part)]
        if missing or isinstance(one, type):
            what = f"has no {missing[0]}" if missing else "is a class: give an instance"
            raise UsageError(f"passes: {one!r} is no pass, for it {what}; see docs/add-a-pass.md")
        if one.name in seen:
            raise UsageError(f"passes: two passes are named {one.name!r}: give each a name of its own")
        seen.add(one.name)
    return tuple(value)


def as_names(option: str, value: PyObject) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(n, str) and n for n in names):
        raise UsageError(f"{option}={value!r}: it must be the name of a pass, or several; `moeopt passes` lists them")
    return tuple(sorted(names) if isinstance(names, (set, frozenset)) else names)


def as_printed(value: PyObject) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    try:
        return as_names("print_passes", value)
    except UsageError:
        raise UsageError(
            f"print_passes={value!r}: it must be True or False, or the name of a pass, or several; `moeopt passes` "
            "lists them"
        ) from None


def as_groups(value: PyObject, dense: str, experts: int | None) -> PyObject:
    if value is None:
        return None
    if dense != "split":
        raise UsageError("groups says how to split a dense FFN: give dense='split' and experts=N as well")
    if value == "coactivation":
        return value
    if not isinstance(value, Mapping):
        raise UsageError(
            f"groups={value!r}: it must be 'coactivation', or map name patterns to lists of neuron numbers"
        )
    checked: dict[str, tuple[tuple[int, ...], ...]] = {}
    for pattern, given in value.items():
        try:
            lists = tuple(tuple(operator.index(n) for n in group) for group in given)
        except TypeError as err:
            raise UsageError(f"groups[{pattern!r}] must be lists of whole numbers, one list a group") from err
        if len(lists) != experts or not all(lists):
            raise UsageError(f"groups[{pattern!r}] has {len(lists)} lists: give experts={experts} lists, none empty")
        seen: set[int] = set()
        for n in (n for group in lists for n in group):
            if n in seen:
                raise UsageError(f"groups[{pattern!r}] has neuron {n} twice: each neuron belongs to one group")
            seen.add(n)
        checked[pattern] = lists
    return checked


def as_device(value: PyObject) -> torch.device | None:
    if value is None or isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as err:
        raise UsageError(f"device={value!r} is not a device: give one like 'cpu' or 'cuda:0'") from err


def check_device(device: torch.device | None) -> None:
    """``UsageError`` where this machine has no such device, or the device keeps no values."""
    if device is None:
        return
    if device.type == "meta":
        raise UsageError("device='meta' keeps no values, and so nothing can be verified on it: give 'cpu' or 'cuda:0'")
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as err:
        gpus = torch.cuda.device_count()
        other = "" if device.type == "cuda" else f"no {device.type} device that this torch can use"
        has = other or "no CUDA GPU" if not gpus else f"{gpus} CUDA GPU{'s' * (gpus > 1)}, cuda:0 to cuda:{gpus - 1}"
        built = (
            "" if torch.version.cuda or device.type != "cuda" else f"; torch {torch.__version__} is built without CUDA"
        )
        said = str(err).strip().splitlines()[0][:200] if str(err).strip() else type(err).__name__
        why = built or f" ({said})"
        raise UsageError(
            f"device={str(device)!r}: this machine has {has}{why}: give device='cpu', or leave it out"
        ) from err


def as_dtype(value: PyObject) -> torch.dtype | None:
    found: PyObject = value
    if isinstance(value, str):
        word = value.removeprefix("torch.").lower()
        found = getattr(torch, _SHORT_DTYPES.get(word, word), None)
    if value is None:
        return None
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise UsageError(
        f"dtype={value!r} is not a floating-point dtype: give one like torch.bfloat16, 'bfloat16' or 'bf16'"
    )


def check_passes(options: PyObject) -> None:
    """``UsageError`` for a pass that is asked for and left out."""
    if both := sorted({*options.only_passes} & {*options.skip_passes}):
        raise UsageError(
            f"only_passes and skip_passes (or MOEOPT_SKIP_PASSES) both name {', '.join(both)}: drop it from one of them"
        )


def as_dump(value: PyObject) -> PyObject:
    if value is None or (isinstance(value, (str, os.PathLike)) and os.fspath(value)):
        return value
    raise UsageError(f"dump={value!r}: it must be the path of a folder")
