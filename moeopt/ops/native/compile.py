"""The compiler's commands: one object for each instruction set, one library.

Whoever builds a wheel has no torch, so only the standard library is imported here, and this file is run by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Where a wheel carries the library."""

ISAS = {
    "generic": 1, "avx2": 2, "avx2_vnni": 4, "avx512": 8, "avx512_vnni": 16, "avx512_bf16": 32, "amx_bf16": 64,
    "neon": 128,
}  # fmt: skip
"""Instruction sets by name, with their bit in the C interface: x86's, weakest first, and that of 64-bit ARM."""
TILES = "amx_bf16"
"""The one with tiles, which multiply bfloat16; for all else it has the code of the one before it."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX_VNNI = "-mavxvnni"
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_VNNI = (*_AVX512, "-mavx512vnni")
_BF16 = (*_VNNI, "-mavx512bf16")
_AMX = (*_BF16, "-mamx-tile", "-mamx-bf16")
_ISA_FLAGS = {
    "generic": (),
    "avx2": _AVX2,
    "avx2_vnni": (*_AVX2, _AVX_VNNI),
    "avx512": _AVX512,
    "avx512_vnni": _VNNI,
    "avx512_bf16": _BF16,
    TILES: _AMX,
    "neon": ("-DMOEOPT_NEON",),
}
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast", "-w")  # fmt: skip
"""-w: GCC's own headers of vector intrinsics warn by the thousand; the tests compile with warnings on what is ours."""
LIBRARIES = ("-pthread", "-ldl") if sys.platform.startswith("linux") else ("-pthread",)
UNITS = ("experts.cpp", "pool.cpp", "team.cpp", "ort_op.cpp")
"""What is compiled once; ``isa.cpp`` and ``isa64.cpp`` are compiled for each instruction set but that of tiles."""

SECONDS = 300
"""After which a compiler is stopped."""


class Refused(Exception):
    """The compiler refused; the message has its first error."""


class TooSlow(Exception):
    """The compiler took longer than ``SECONDS``."""


def x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32


def arm64() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64") and sys.maxsize > 2**32


def all_isas() -> tuple[str, ...]:
    """Every instruction set that a library for this kind of machine may carry, weakest first."""
    if arm64():
        return "generic", "neon"
    return tuple(isa for isa in ISAS if isa != "neon") if x86() else ("generic",)


def with_what_it_needs(isa: str) -> tuple[str, ...]:
    """The least instruction sets of a library that carries ``isa``."""
    return ("avx512_bf16", TILES) if isa == TILES else (isa,)


def compiler_named(wanted: str | None) -> str | None:
    """The C++ compiler ``wanted``, else g++, clang++ or c++ of the path; None where there is none."""
    names = [wanted] if wanted else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def digest_of_sources(*about: str, sources: Path = SOURCES) -> str:
    """The hash of the kernel's sources, and of what else a library or an answer depends on."""
    digest = hashlib.sha256("\0".join(about).encode())
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def prebuilt_name(isas: Sequence[str]) -> str:
    """The name of a wheel's library: the hash of its sources and of the kind of machine, and its instruction sets."""
    return "-".join(["moeopt-experts", digest_of_sources(sys.platform, platform.machine()), *isas]) + ".so"


def prebuilt(isa: str) -> Path | None:
    """The library that a wheel brought, if it is of these sources and has ``isa``."""
    every = all_isas()
    for count in range(len(every), 0, -1):
        path = PREBUILT / prebuilt_name(every[:count])
        if isa in every[:count] and path.is_file():
            return path
    return None


def compile_library(
    compiler: str, isas: Sequence[str], aside: Path, flags: Sequence[str] = FLAGS, sources: Path = SOURCES,
    tile_flags: Sequence[str] = _AMX,
) -> Path:  # fmt: skip
    """A library with ``isas`` in the folder ``aside``; ``Refused`` or ``TooSlow`` where the compiler makes none."""
    defines = [f"-DMOEOPT_HAVE_{isa.upper()}" for isa in isas]
    whole = [isa for isa in reversed(isas) if isa != TILES]  # what an older compiler refuses comes first
    units = [([*tile_flags], "tiles.cpp", "tiles.o")] * (TILES in isas)
    of_isa = {isa: _flags_of(compiler, isa) for isa in whole}
    units += [([*of_isa[isa], f"-DMOEOPT_KERNELS=kernels_{isa}", f"-DMOEOPT_ISA=ISA_{isa.upper()}"], "isa.cpp",
              f"{isa}.o") for isa in whole]  # fmt: skip
    units += [([*of_isa[isa], f"-DMOEOPT_KERNELS64=kernels64_{isa}", f"-DMOEOPT_ISA=ISA_{isa.upper()}"],
               "isa64.cpp", f"{isa}-64.o") for isa in whole]  # fmt: skip
    units += [(defines, name, f"{name}.o") for name in UNITS]
    running = [
        [compiler, *flags, *own, "-c", str(sources / source), "-o", str(aside / out)] for own, source, out in units
    ]
    _run_all(running)
    out = aside / "library.so"
    objects = [str(aside / name) for _, _, name in units]
    _run_all([[compiler, *flags, "-shared", *objects, "-o", str(out), *LIBRARIES]])
    return out


def _flags_of(compiler: str, isa: str) -> tuple[str, ...]:
    """A compiler that knows AVX-512's instruction sets may not know AVX-VNNI: code of AVX2 does, to the same bits."""
    flags = _ISA_FLAGS[isa]
    return _AVX2 if _AVX_VNNI in flags and not _knows(compiler, _AVX_VNNI) else flags


def _knows(compiler: str, flag: str) -> bool:
    words = [compiler, flag, "-x", "c++", "-E", os.devnull]
    return subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS).returncode == 0


def _run_all(commands: Iterable[Sequence[str]]) -> None:
    """As many compilers at once as this process has cores: each takes some hundred megabytes, and has its seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    running: deque[subprocess.Popen[bytes]] = deque()
    try:
        for words in commands:
            if len(running) == cores:
                _finish_first(running)
            running.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        while running:
            _finish_first(running)
    finally:
        for one in running:
            one.kill()
            one.communicate()


def compile_most(compiler: str, aside: Path) -> tuple[Path, tuple[str, ...]]:
    """A library with every instruction set that the compiler knows, and which these are."""
    isas = all_isas()
    while True:
        try:
            return compile_library(compiler, isas, aside), isas
        except Refused:
            if len(isas) == 1:
                raise
            isas = isas[:-1]


def _finish_first(running: deque[subprocess.Popen[bytes]]) -> None:
    """Wait for the first and take it away; it stays where it did not end well."""
    process = running[0]
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise TooSlow from None
    if process.returncode:
        first = said.decode(errors="replace").strip().splitlines()
        raise Refused(next((s for s in first if "error" in s), "no message"))
    running.popleft()
