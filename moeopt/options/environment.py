"""What the process's environment variables choose; nothing else in moeopt reads them."""

from __future__ import annotations

import contextlib
import difflib
import os
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from moeopt.errors import UsageError
from moeopt.options.instruction_sets import INSTRUCTION_SETS, isas_here

_Value = TypeVar("_Value")

OF_USERS = (
    "MOEOPT_VERIFY", "MOEOPT_SEED", "MOEOPT_FUEL", "MOEOPT_DUMP", "MOEOPT_SKIP_PASSES", "MOEOPT_PRINT_PASSES",
    "MOEOPT_CACHE", "MOEOPT_MEASURE", "MOEOPT_NATIVE", "MOEOPT_NATIVE_ISA", "MOEOPT_CXX",
)  # fmt: skip
"""Every variable of moeopt; a name much like one of these is taken for a slip, for it would choose nothing."""


def from_variable(name: str, default: _Value, convert: Callable[[str], _Value], wanted: str) -> _Value:
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
    return from_variable("MOEOPT_MEASURE", True, {"on": True, "off": False}.__getitem__, "on or off")


def native_wanted() -> bool:
    """Whether the kernel in C++ may be built and used."""
    return from_variable("MOEOPT_NATIVE", True, {"on": True, "off": False}.__getitem__, "on or off")


def check_variables() -> None:
    """``UsageError`` for a name that is none of moeopt's, or a value that a variable of no field cannot have."""
    for name in variables_beginning(("MOEOPT_",)):
        close = difflib.get_close_matches(name, OF_USERS, n=1, cutoff=0.85)
        if close and name not in OF_USERS:
            raise UsageError(f"there is no environment variable {name}: did you mean {close[0]}?")
    measuring()
    native_wanted()
    wanted, here = native_isa(), isas_here()
    if wanted is not None and wanted not in here:
        raise UsageError(
            f"the environment variable MOEOPT_NATIVE_ISA is {wanted!r}, which this CPU does not run: it must be one of "
            f"{', '.join(here)}, or unset"
        )


def native_isa() -> str | None:
    """The instruction set that the user wants the native kernel to play; None: the best there is."""
    known: dict[str, str | None] = {isa: isa for isa in INSTRUCTION_SETS}
    return from_variable("MOEOPT_NATIVE_ISA", None, known.__getitem__, f"one of {', '.join(known)}")


def compiler_wanted() -> str | None:
    """The C++ compiler that the user names, or None."""
    return next((os.environ[n].strip() for n in ("MOEOPT_CXX", "CXX") if os.environ.get(n, "").strip()), None)


def cpu_limits() -> dict[str, str]:
    """The variables by which a user lets torch's libraries play a lesser CPU."""
    return inherited("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


ONE_VARIABLE = type(os.environ).__getitem__.__code__
"""What runs where one variable is looked up, whose name is its ``key``: ``os.getenv(name)``, ``name in os.environ``."""
ALL_VARIABLES = type(os.environ).__iter__.__code__
"""What runs where code goes through all of them."""
ASKED_WITH = frozenset(("environ", "getenv", "environb", "getenvb"))
"""Names in code that looks variables up."""
EVERY_VARIABLE = ""
"""Among names of variables: all that there are. None has this name."""


def variables(names: Collection[str]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The process's table of variables, and the keys of those of ``names`` in it; ``EVERY_VARIABLE`` stands for all."""
    table: dict[Any, Any] = getattr(os.environ, "_data", {})  # encoded; os.environ decodes at each access
    keys: dict[str, Any] = {}
    for name in sorted(os.environ if EVERY_VARIABLE in names else names):
        with contextlib.suppress(UnicodeEncodeError):  # a word of the code that no variable can have as its name
            keys[name] = os.environ.encodekey(name)
    return table, {name: key for name, key in keys.items() if key in table}


def names_in(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]


def passes_to_print() -> bool | tuple[str, ...]:
    """What ``MOEOPT_PRINT_PASSES`` asks for: all passes, none, or those of these names."""
    text = os.environ.get("MOEOPT_PRINT_PASSES", "").strip()
    try:
        return flag(text or "0")
    except KeyError:
        return names_in(text)


_VARIABLES, _SET = threading.Lock(), dict[str, tuple[int, "str | None"]]()
"""The lock of the variables that are set, and by name how many callers are inside and the value before."""


@contextlib.contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """While a caller is inside, a variable that another library reads has ``value``; the last one out restores it."""
    with _VARIABLES:
        inside, before = _SET.get(name, (0, os.environ.get(name)))
        _SET[name] = inside + 1, before
        os.environ[name] = value
    try:
        yield
    finally:
        with _VARIABLES:
            inside, before = _SET.pop(name)
            if inside > 1:
                _SET[name] = inside - 1, before
            elif before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


def variables_beginning(beginnings: tuple[str, ...]) -> dict[str, str]:
    """The variables that are set in this process and whose names begin so, in the order of their names."""
    return {name: value for name, value in sorted(os.environ.items()) if beginnings and name.startswith(beginnings)}
