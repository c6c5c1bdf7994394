"""The kernel of this process: built or found, loaded, checked against the reference, or not there, with the reason."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moeopt.errors import MoeoptError, NativeKernelWarning
from moeopt.ops.native.build import ISAS, BuildError, CompileError, build_all, built_library, isas_here
from moeopt.ops.native.call import ABI, NativeRun
from moeopt.ops.native.selfcheck import first_difference
from moeopt.options import native_isa, native_wanted


@dataclass(frozen=True)
class Library:
    """A loaded kernel; ``run`` releases the interpreter's lock while it computes."""

    path: Path
    isa: str
    run: NativeRun = field(compare=False)

    @property
    def bit(self) -> int:
        return ISAS[self.isa]


class NoLibrary(MoeoptError):
    """There is no kernel; the message says why and what to do."""


_found: Library | NoLibrary | None = None
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have been building


def library() -> Library | None:
    """The kernel, made ready at the first call; None where there is none, which is said once, as a warning."""
    found = _found
    if found is None:
        found = _make_ready()
    return found if isinstance(found, Library) else None


def missing() -> str:
    """Why this process has no kernel; "" where it has one, or where the user wants none."""
    library()
    return str(_found) if isinstance(_found, NoLibrary) and native_wanted() else ""


def describe() -> str:
    """The kernel in a line, for ``moeopt info``."""
    found = library()
    if found is not None:
        return f"{found.isa} ({found.path})"
    return missing() or "off (MOEOPT_NATIVE)"


def _make_ready() -> Library | NoLibrary:
    global _found
    with _lock:
        if _found is None:
            try:
                _found = load()
            except NoLibrary as err:
                _found = err
                if native_wanted():
                    warnings.warn(
                        f"the native CPU kernel is not used, torch's matmuls are: {err}",
                        NativeKernelWarning,
                        stacklevel=3,  # whoever asks: this function has one caller
                    )
        return _found


def load() -> Library:
    """Build or find, load and check the kernel for the best instruction set; :class:`NoLibrary` says why it is not."""
    if not native_wanted():
        raise NoLibrary("MOEOPT_NATIVE is off")
    wanted = native_isa()
    here = isas_here()
    if wanted is not None and wanted not in here:
        raise NoLibrary(f"MOEOPT_NATIVE_ISA is {wanted}, and this CPU runs {', '.join(here)}")
    reason = ""
    # a compiler may be too old for the best instruction set and know a lesser one
    for isa in [wanted] if wanted else here[::-1]:
        try:
            return checked(opened(built_library(isa), isa))
        except CompileError as err:
            reason = reason or str(err)
        except BuildError as err:
            raise NoLibrary(str(err)) from err
    raise NoLibrary(reason)


def build_ahead() -> tuple[Path, dict[str, str]]:
    """Build every instruction set that the compiler knows, and check those that this CPU runs.

    Returns:
        the library, and a word for each instruction set in it.

    Raises:
        BuildError, NoLibrary: it could not be built, or computes something else than the reference here.
    """
    path, isas = build_all()
    here, said = isas_here(), {}
    for isa in isas:
        if isa in here:
            checked(opened(path, isa))
        said[isa] = "checked against the reference" if isa in here else "built, not executed: this CPU does not run it"
    return path, said


def opened(path: Path, isa: str) -> Library:
    """The library of ``path``, for ``isa``."""
    try:
        loaded = ctypes.CDLL(str(path))
        abi, isas, run = loaded.moeopt_abi, loaded.moeopt_isas, loaded.moeopt_experts
    except (OSError, AttributeError) as err:
        raise NoLibrary(f"{path} cannot be loaded ({err}); remove it, and it is built anew") from err
    for function in (abi, isas, run):
        function.restype = ctypes.c_int64
    if abi() != ABI:
        raise NoLibrary(f"{path} has interface {abi()}, not {ABI}; remove it, and it is built anew")
    if not isas() & ISAS[isa]:
        raise NoLibrary(f"{path} has no kernel for {isa} on this CPU; remove it, and it is built anew")
    return Library(path, isa, run)


def checked(library: Library) -> Library:
    """``library``, if it computes what the reference does."""
    with torch.device("cpu"):  # the caller may have another default
        difference = first_difference(library.run, library.bit)
    if difference:
        raise NoLibrary(
            f"{library.path} computes something else than the reference here ({difference}); "
            "please report it, with the output of `moeopt info`"
        )
    return library
