"""Compile the kernel: one object for each instruction set, one library, kept in the user's cache directory.

The library needs no header and no library of torch, so one serves every torch and every Python. Its name has the hash
of the sources, of the compiler and of the flags: what was built from others is never taken for it. It is written aside
and moved into place, so two processes that build at once do each other no harm.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from moeopt.errors import MoeoptError
from moeopt.file_lock import wait_for_lock
from moeopt.ops.native.compile import (
    FLAGS,
    SECONDS,
    SOURCES,
    Refused,
    TooSlow,
    all_isas,
    compile_library,
    compiler_named,
    digest_of_sources,
    prebuilt,
    with_what_it_needs,
)
from moeopt.ops.native.compile import ISAS as ISAS
from moeopt.options import cache_directory, compiler_wanted
from moeopt.options.instruction_sets import isas_here as isas_here

_FLAGS = FLAGS

_ROOT = 0


class BuildError(MoeoptError):
    """The kernel could not be built; the message says why and what to do."""


class CompileError(BuildError):
    """The compiler refused: it may be too old for an instruction set."""


@functools.cache
def find_compiler() -> str | None:
    """The C++ compiler: ``MOEOPT_CXX`` or ``CXX``, else g++, clang++ or c++ of the path; None where there is none."""
    return compiler_named(compiler_wanted())


def how_to_get_one() -> str:
    wanted = compiler_wanted()
    if wanted:
        return f"MOEOPT_CXX or CXX names {wanted!r}, which is not on the path: correct or unset it"
    install = {"Linux": "apt install g++, dnf install gcc-c++ or apk add g++", "Darwin": "xcode-select --install"}
    return f"no C++ compiler was found; install one ({install.get(platform.system(), 'g++ or clang++')})"


@functools.cache
def _identity(compiler: str) -> str:
    """The hash of all that the library depends on, but for its instruction sets."""
    said = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS).stdout
    return digest_of_sources(said.decode(errors="replace"), *_FLAGS, platform.machine(), sources=SOURCES)


def library_name(compiler: str, isas: Sequence[str]) -> str:
    return f"moeopt-experts-{_identity(compiler)}-{'-'.join(isas)}.so"


def built_library(isa: str) -> Path:
    """A library that carries ``isa``: the wheel's, one that is there already, else built now.

    Raises:
        BuildError: there is no compiler, or it refuses; nowhere to keep the library.
    """
    if packaged := prebuilt(isa):
        return packaged
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(how_to_get_one())
    folder = _folder()
    every = all_isas()
    alone = with_what_it_needs(isa)
    for isas in [*(every[:count] for count in range(len(every), 0, -1)), alone]:  # what build_all may have left
        path = folder / library_name(compiler, isas)
        if isa in isas and path.is_file():
            _own(path)
            return path
    return build(alone, folder)


def build_all() -> tuple[Path, tuple[str, ...]]:
    """A library with every instruction set that the compiler knows, in the cache; and which these are."""
    isas = all_isas()
    while True:
        try:
            return build(isas), isas
        except CompileError:
            if len(isas) == 1:
                raise
            isas = isas[:-1]


def build(isas: Sequence[str], folder: Path | None = None) -> Path:
    """Compile a library with ``isas`` into ``folder`` (None: the cache) and return its path; ``BuildError`` if not."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(how_to_get_one())
    folder = _folder() if folder is None else folder
    path = folder / library_name(compiler, isas)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(folder), tempfile.TemporaryDirectory(dir=folder, prefix="building-") as aside:
            if not path.is_file():
                os.replace(_compile(compiler, isas, Path(aside)), path)
    except OSError as err:
        raise BuildError(f"{folder} cannot be written to ({err}); name another folder with MOEOPT_CACHE") from err
    return path


def _compile(compiler: str, isas: Sequence[str], aside: Path) -> Path:
    try:
        return compile_library(compiler, isas, aside, _FLAGS, SOURCES)
    except TooSlow:
        raise BuildError(f"{compiler} took longer than {SECONDS} s; set MOEOPT_NATIVE=off to do without") from None
    except Refused as err:
        raise CompileError(
            f"{compiler} could not compile the kernel ({err}); "
            "name another compiler with MOEOPT_CXX, or set MOEOPT_NATIVE=off"
        ) from None


def _folder() -> Path:
    folder = cache_directory()
    if folder is None:
        raise BuildError("this user has no home directory to keep the kernel in; name a folder with MOEOPT_CACHE")
    return folder / "native"


def _own(path: Path) -> None:
    """Code is loaded only from files that this user, or root, has written."""
    if hasattr(os, "geteuid") and path.stat().st_uid not in (os.geteuid(), _ROOT):
        raise BuildError(f"{path} belongs to another user and is not loaded; remove it, or set MOEOPT_CACHE")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time in ``folder``, where the system has file locks: the second finds what the first built."""
    with open(folder / "lock", "w") as file:
        wait_for_lock(file.fileno())
        yield
