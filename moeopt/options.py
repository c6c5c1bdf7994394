"""Everything a user may choose, in one frozen value; the only place that reads MOEOPT_* variables.

A field that is not given takes its environment variable where it has one, and its default otherwise:

    MOEOPT_VERIFY  verify  strict, fast or off
    MOEOPT_SEED    seed    an integer
    MOEOPT_FUEL    fuel    at most so many passes are applied, over all blocks, for bisecting
    MOEOPT_DUMP    dump    a folder for each block's graph, reading and program, before and after each pass
    MOEOPT_SKIP_PASSES     skip_passes     names of passes, with commas between
    MOEOPT_PRINT_PASSES    print_passes    1: each pass that ran, as a line on stderr and in the report

Choices of the whole process, which are no fields, for a call of the op has no ``Options``:

    MOEOPT_CACHE    the folder of what was measured and built here; else the user's cache directory
    MOEOPT_MEASURE  off: measure nothing on this machine, each choice has its safe default
    MOEOPT_NATIVE   off: do without the kernel in C++
    MOEOPT_NATIVE_ISA  the instruction set that it plays: generic, avx2, avx512 or avx512_bf16
    MOEOPT_CXX      the compiler that builds it
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

Verify = Literal["strict", "fast", "off"]
DenseMode = Literal["leave", "fuse", "split"]
_SHORT_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16",
    "fp32": "float32", "f32": "float32", "float": "float32", "fp64": "float64", "f64": "float64", "double": "float64",
}  # fmt: skip
_CHOICES: dict[str, tuple[str, ...]] = {"verify": ("strict", "fast", "off"), "dense": ("leave", "fuse", "split")}


_Value = TypeVar("_Value")


def _env(name: str, default: _Value, convert: Callable[[str], _Value], wanted: str) -> _Value:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return convert(text)
    except (ValueError, KeyError):
        raise UsageError(f"the environment variable {name} is {text!r}; it must be {wanted}, or unset") from None


def in_ci() -> bool:
    """Whether this runs in continuous integration, where nobody watches a bar: ``CI`` is set there."""
    return os.environ.get("CI", "").strip().lower() not in ("", "0", "false")


def inherited(*names: str) -> dict[str, str]:
    """Those of the named environment variables that are set, for a process that shall have no others."""
    return {name: os.environ[name] for name in names if name in os.environ}


def cache_directory() -> Path | None:
    """Where this user's measurements and built kernels are kept; None where the user has no home. It may not exist."""
    given = os.environ.get("MOEOPT_CACHE", "").strip()
    if given:
        return Path(given)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        if os.environ.get(name, "").strip():
            return Path(os.environ[name]) / "moeopt"
    try:
        return Path.home() / ".cache" / "moeopt"
    except RuntimeError:
        return None


def measuring() -> bool:
    """Whether moeopt may time this machine, for milliseconds, to choose between equal kernels."""
    return _env("MOEOPT_MEASURE", True, {"on": True, "off": False}.__getitem__, "on or off")


def native_wanted() -> bool:
    """Whether the kernel in C++ may be built and used."""
    return _env("MOEOPT_NATIVE", True, {"on": True, "off": False}.__getitem__, "on or off")


def native_isa(known: Mapping[str, int]) -> str | None:
    """The instruction set that the user wants the native kernel to play, one of ``known``; None: the best there is."""

    def checked(text: str) -> str | None:
        if text not in known:
            raise ValueError(text)
        return text

    return _env("MOEOPT_NATIVE_ISA", None, checked, f"one of {', '.join(known)}")


def compiler_wanted() -> str | None:
    """The C++ compiler that the user names, or None."""
    return next((os.environ[n].strip() for n in ("MOEOPT_CXX", "CXX") if os.environ.get(n, "").strip()), None)


def cpu_limits() -> dict[str, str]:
    """The variables by which a user lets torch's libraries play a lesser CPU."""
    return inherited("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def variables(names: Collection[str]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """For code that uses ``names``: the process's table of variables, and the keys of those that it may read.

    Both are empty where it reads none.
    """
    if not {"environ", "getenv"}.intersection(names):
        return {}, {}
    table: dict[Any, Any] = getattr(os.environ, "_data", {})  # encoded; os.environ decodes at each access
    keys = {name: os.environ.encodekey(name) for name in sorted(names)}
    return table, {name: key for name, key in keys.items() if key in table}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The choices of one ``moeopt.optimize``; raises ``UsageError`` for a value it cannot take.

    Args:
        device: where the optimised model runs; None means where the model is. A string becomes a ``torch.device``.
        dtype: the dtype that the model's floating-point parameters are cast to first; None leaves them. A string
            becomes a ``torch.dtype``.
        verify: ``strict`` runs every case, ``fast`` fewer, ``off`` none (the certificate says so).
        tune: measure the lowerings on this machine instead of estimating their cost.
        tokens: the token counts that an engine will see in one call, to choose its lowerings for; None means a
            decode, small batches and a prompt.
        dense: what happens to a dense FFN: ``leave`` it; ``fuse`` it into the op where that is measured to be quicker
            for ``tokens``; or ``split`` its neurons into ``experts`` groups.
        experts: how many groups ``dense="split"`` makes.
        groups: which neurons ``dense="split"`` puts together. None: neighbours, no copy. ``"coactivation"``: those that
            are active on the same tokens of the example inputs. A mapping of module name pattern -> ``experts`` lists
            of neuron numbers, for the FFNs of the modules that match; the others get neighbours. Groups that are not
            of neighbours are picked from the weights at each call, which takes time and, while it runs, memory.
        target: the device an engine is built for when it is not this machine's, as the backend names it.
        profile: the sizes that a TensorRT engine is built for: a mapping of an input's name to its least, best and
            largest shape, or several such mappings; None means from 1 to four times the example's.
        tf32: let a TensorRT engine round the inputs of float32 matmuls to TF32.
        timing_cache: a file in which TensorRT keeps what it measured, for the next build.
        build_seconds: after which a TensorRT builder is stopped.
        build_gigabytes: of memory after which it is stopped; None means what is free on this machine.
        session_options: an ``onnxruntime.SessionOptions`` for the engine's session: threads, arenas, profiling.
        inplace: rewrite the model that was given instead of a copy that shares its weights.
        hints: name pattern -> ``ExpertsSpec`` or callable, for blocks that recognition declines.
        progress: called with one line of text as each long step begins; None shows a bar on a terminal and in a
            notebook, and nothing in CI; True and False show it always and never. The logger ``moeopt`` gets the lines.
        seed: of every random input that moeopt makes.
        fuel: keep at most so many applications of passes over all blocks; None means no limit. A block takes one to be
            rewritten at all, and one for each further pass that changes it.
        dump: a folder that gets a text file of each block's graph, reading and program; None means none.
        passes: the passes that run, in order: values with ``name``, ``level`` and ``apply``; None means
            ``moeopt.passes.PIPELINE``.
        skip_passes: names of passes that do not run (``moeopt passes`` lists them); one name or several.
        only_passes: names of the only passes that run; () means all that are on. Naming a pass that is off turns it on.
        print_passes: print a line on stderr for each pass that ran on a block, and a list of them in the report.
    """

    device: Any = None
    dtype: Any = None
    verify: Verify = field(default_factory=lambda: cast(Verify, _env("MOEOPT_VERIFY", "strict", str, "a level")))
    tune: bool = False
    tokens: tuple[int, ...] | None = None
    dense: DenseMode = "leave"
    experts: int | None = None
    groups: Any = field(default=None, hash=False)
    target: str | None = None
    profile: Any = field(default=None, hash=False)
    tf32: bool = False
    timing_cache: str | None = None
    build_seconds: float = 3600.0
    build_gigabytes: float | None = None
    session_options: Any = field(default=None, hash=False)
    inplace: bool = False
    hints: Mapping[str, Any] = field(default_factory=dict, hash=False)
    progress: Callable[[str], None] | bool | None = None
    seed: int = field(default_factory=lambda: _env("MOEOPT_SEED", 0, int, "an integer"))
    fuel: int | None = field(default_factory=lambda: _env("MOEOPT_FUEL", None, int, "an integer"))
    dump: str | os.PathLike[str] | None = field(default_factory=lambda: _env("MOEOPT_DUMP", None, str, "a directory"))
    passes: tuple[Any, ...] | None = field(default=None, hash=False)
    skip_passes: tuple[str, ...] = field(
        default_factory=lambda: _env(
            "MOEOPT_SKIP_PASSES", tuple[str, ...](), _names, "names of passes with commas between"
        )
    )
    only_passes: tuple[str, ...] = ()
    print_passes: bool = field(default_factory=lambda: _env("MOEOPT_PRINT_PASSES", False, _flag, "1 or 0"))

    def __new__(cls, **given: PyObject) -> Options:
        """Remember which fields were given, so that ``from_fields`` can tell one that is given twice."""
        self = object.__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name}={getattr(self, name)!r}: it must be one of {', '.join(choices)}")
        if self.passes is not None:
            object.__setattr__(self, "passes", _as_passes(self.passes))
        for name in ("skip_passes", "only_passes"):
            object.__setattr__(self, name, _as_names(name, getattr(self, name)))
        self._check_numbers()
        if self.tokens is not None:
            counts = (self.tokens,) if isinstance(self.tokens, int) else tuple(self.tokens)
            if not counts or any(isinstance(t, bool) or not isinstance(t, int) or t < 1 for t in counts):
                raise UsageError(f"tokens={self.tokens!r}: it must be whole numbers of 1 or more, like (1, 128)")
            object.__setattr__(self, "tokens", counts)
        self._check_dense()
        object.__setattr__(self, "groups", _as_groups(self.groups, self.dense, self.experts))
        if not isinstance(self.hints, Mapping):
            raise UsageError(f"hints={self.hints!r}: it must map name patterns to an ExpertsSpec or a callable")
        if self.progress is not None and not isinstance(self.progress, bool) and not callable(self.progress):
            raise UsageError(
                f"progress={self.progress!r}: it must be a callable that takes one line of text, or True or False"
            )
        if self.dump is not None and not isinstance(self.dump, (str, os.PathLike)):
            raise UsageError(f"dump={self.dump!r}: it must be the path of a folder")
        object.__setattr__(self, "hints", dict(self.hints))
        object.__setattr__(self, "device", _as_device(self.device))
        object.__setattr__(self, "dtype", _as_dtype(self.dtype))

    def _check_numbers(self) -> None:
        for name in ("tune", "inplace", "tf32", "print_passes"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}={getattr(self, name)!r}: it must be True or False")
        for name, least in (("experts", 1), ("seed", 0), ("fuel", 0)):
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value!r}: it must be a whole number, {least} or more")
        for name in ("build_seconds", "build_gigabytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
                raise UsageError(f"{name}={value!r}: it must be a number above 0")

    def _check_dense(self) -> None:
        if self.dense == "split" and self.experts is None:
            raise UsageError("dense='split' needs experts=N: into how many groups a dense FFN is split")
        if self.dense == "split" and self.experts == 1:
            raise UsageError("experts=1 leaves each dense FFN whole: give 2 or more, or dense='leave'")
        if self.dense != "split" and self.experts is not None:
            raise UsageError(f"experts={self.experts} says how to split a dense FFN: give dense='split' as well")

    @classmethod
    def from_fields(cls, options: Options | None, fields: Mapping[str, Any]) -> Options:
        """``options`` with ``fields`` on top; ``UsageError`` for an unknown field or one given twice."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                meant = f"did you mean {' or '.join(close)}?" if close else f"the fields are {', '.join(known)}"
                raise UsageError(f"there is no option {name!r}: {meant}")
        if options is None:
            return cls(**fields)
        if not isinstance(options, Options):
            raise UsageError(f"options={options!r}: it must be a moeopt.Options")
        twice = sorted(options.given & set(fields))
        if twice:
            raise UsageError(f"{twice[0]} is given twice, in options and as a keyword: give it once")
        return cls(**{name: getattr(options, name) for name in options.given} | dict(fields))

    @property
    def given(self) -> frozenset[str]:
        """The fields that were given by name when this value was made.

        ``dataclasses.replace`` and a copy that gives every field count as giving those that are not the default.
        """
        names: frozenset[str] = getattr(self, "_given", frozenset())
        if len(names) < len(dataclasses.fields(self)):
            return names
        default = Options()
        return frozenset(n for n in names if getattr(self, n) != getattr(default, n))

    def say(self, line: str) -> None:
        """Pass one line to ``progress``, if there is one."""
        if callable(self.progress):
            self.progress(line)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]


def _as_passes(value: PyObject) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"passes={value!r}: it must be a tuple of passes, like (*moeopt.passes.PIPELINE, MyPass())")
    seen: set[str] = set()
    for one in value:
        missing = [part for part in ("name", "level", "apply") if not hasattr(one, part)]
        if missing or isinstance(one, type):
            what = f"has no {missing[0]}" if missing else "is a class: give an instance"
            raise UsageError(f"passes: {one!r} is no pass, for it {what}; see docs/add-a-pass.md")
        if one.name in seen:
            raise UsageError(f"passes: two passes are named {one.name!r}: give each a name of its own")
        seen.add(one.name)
    return tuple(value)


def _as_names(option: str, value: PyObject) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(n, str) and n for n in names):
        raise UsageError(f"{option}={value!r}: it must be the name of a pass, or several; `moeopt passes` lists them")
    return tuple(sorted(names) if isinstance(names, (set, frozenset)) else names)


def _as_groups(value: PyObject, dense: str, experts: int | None) -> PyObject:
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


def _as_device(value: PyObject) -> torch.device | None:
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
        has = "no CUDA GPU" if not gpus else f"{gpus} CUDA GPU{'s' * (gpus > 1)}, cuda:0 to cuda:{gpus - 1}"
        built = (
            "" if torch.version.cuda or device.type != "cuda" else f"; torch {torch.__version__} is built without CUDA"
        )
        said = str(err).strip().splitlines()[0][:200] if str(err).strip() else type(err).__name__
        why = built or f" ({said})"
        raise UsageError(
            f"device={str(device)!r}: this machine has {has}{why}: give device='cpu', or leave it out"
        ) from err


def _as_dtype(value: PyObject) -> torch.dtype | None:
    found: Any = value
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
