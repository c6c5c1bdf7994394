"""The kernel of this process: built or found, loaded, checked against the reference, or not there, with the reason."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moeopt.errors import MoeoptError, NativeKernelWarning
from moeopt.ops.native.build import ISAS, BuildError, CompileError, build_all, built_library, isas_here
from moeopt.ops.native.by_lane import BY_LANE, HAVE_LANES, by_lane_differs, by_lane_pays
from moeopt.ops.native.call import ABI, NativeRun
from moeopt.ops.native.compile import TILES, prebuilt
from moeopt.ops.native.selfcheck import first_difference
from moeopt.ops.native.tiles import wrong_in_a_child
from moeopt.options import native_isa, native_wanted
from moeopt.options.instruction_sets import cpu_has_tiles


@dataclass(frozen=True)
class Library:
    """A loaded kernel; ``run`` releases the interpreter's lock while it computes.

    Attributes:
        passed_over: why it has none of the instruction sets that would come before its own, in words; "" where it is
            the best of this CPU, or the one that the user wants.
        by_lane: whether many rows of an expert are multiplied lane by lane, to the same bits; None before that is
            measured.
    """

    path: Path
    isa: str
    run: NativeRun = field(compare=False)
    passed_over: str = field(default="", compare=False)
    by_lane: bool | None = None

    @property
    def bit(self) -> int:
        return ISAS[self.isa] | (BY_LANE if self.by_lane else 0)


UNSEEN = (TILES, "neon")
"""Instruction sets that were run under emulation only: where one is wrong, that below it is used."""

_NO_TILES = {
    1: "this CPU or its system has no tiles for bfloat16",
    2: "the system refuses this process AMX's tiles",
}
"""What ``moeopt_tiles`` says."""


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
        return f"{found.isa} ({found.path})" + (f"; {found.passed_over}" if found.passed_over else "")
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
                        stacklevel=3,  # the line that asks for the kernel
                    )
        found = _found
    if isinstance(found, Library) and found.by_lane is None:
        # without the lock: another thread that measures holds the lock of measurements, and may ask for the kernel
        measured = replace(found, by_lane=found.isa in HAVE_LANES and by_lane_pays(found.run, found.bit, found.isa))
        with _lock:
            if _found is found:
                _found = measured
        return measured
    return found


def load() -> Library:
    """Build or find, load and check the kernel for the best instruction set; :class:`NoLibrary` says why it is not."""
    if not native_wanted():
        raise NoLibrary("MOEOPT_NATIVE is off")
    wanted = native_isa()
    here = isas_here()
    if wanted is not None and wanted not in here:
        raise NoLibrary(f"MOEOPT_NATIVE_ISA is {wanted}, and this CPU runs {', '.join(here)}")
    passed_over = dict[str, str]()
    if not wanted and TILES not in here and cpu_has_tiles():
        passed_over[TILES] = "the system keeps no tiles for this process, or hides what comes with them"
    may_build = True
    for isa in [wanted] if wanted else here[::-1]:
        try:
            path = built_library(isa) if may_build else prebuilt(isa)
            if path is not None:
                told = "; ".join(f"{name} is not used: {why}" for name, why in passed_over.items())
                return replace(proved(path, isa), passed_over=told)
        except BuildError as err:
            # a compiler may be too old for the best instruction set and know a lesser one, or a wheel carry that
            passed_over[isa], may_build = str(err), isinstance(err, CompileError)
        except NoLibrary as err:
            if wanted or isa not in UNSEEN:
                raise
            passed_over[isa] = str(err)
    raise NoLibrary(next(why for isa, why in passed_over.items() if isa in here))


def proved(path: Path, isa: str) -> Library:
    """The library of ``path`` for ``isa``, if it computes what the reference does: with tiles in another process first.

    Raises:
        NoLibrary: it does not; the message says how.
    """
    if isa == TILES and (wrong := wrong_in_a_child(path, isa)):
        raise NoLibrary(wrong)
    return checked(opened(path, isa))


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
        said[isa] = "checked against the reference" if isa in here else "built, not executed: this CPU does not run it"
        try:
            if isa in here:
                proved(path, isa)
        except NoLibrary as err:
            if isa not in UNSEEN:
                raise
            said[isa] = f"built, not used: {err}"
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
        why = _NO_TILES.get(loaded.moeopt_tiles()) if isa == TILES else None
        raise NoLibrary(why or f"{path} has no kernel for {isa} on this CPU; remove it, and it is built anew")
    return Library(path, isa, run)


def checked(library: Library) -> Library:
    """``library``, if it computes what the reference does."""
    with torch.device("cpu"):  # the caller may have another default
        difference = first_difference(library.run, library.bit)
        if not difference and library.isa in HAVE_LANES:
            difference = by_lane_differs(library.run, library.bit)
    if difference:
        raise NoLibrary(
            f"{library.path} computes something else than the reference here ({difference}); "
            "please report it, with the output of `moeopt info`"
        )
    return library
