"""The kernel compiled for 64-bit ARM and run by an emulator: what a call reads is laid out in one piece and sent there.

It takes a compiler for that CPU (``aarch64-linux-gnu-g++``, or PyPI's ``ziglang``, which is clang with every target's
headers) and QEMU's ``qemu-aarch64``; ``make test-arm`` brings the compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

import pytest

from moeopt.ops.native import build, call, compile

SERVER = Path(__file__).with_name("other_cpu.cpp")
EMULATORS = "qemu-aarch64", "qemu-aarch64-static"
ISAS = "generic", "neon"
MATRIX, VECTOR = 12, 3  # words of moeopt_matrix and moeopt_vector
BYTES = {0: 4, 1: 2, 2: 2, 3: 4, 4: 8, 5: 1, 7: 8}
U4 = 6


def cross_compiler(folder: Path) -> str:
    """A command that compiles C++ for 64-bit ARM; the test is skipped where there is none."""
    if found := shutil.which("aarch64-linux-gnu-g++"):
        return found
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip(
            "no compiler for 64-bit ARM: `make test-arm` installs ziglang, or apt install g++-aarch64-linux-gnu"
        )
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang c++ -target aarch64-linux-musl "$@"\n')
    script.chmod(0o755)
    return str(script)


def emulator() -> str:
    found = next(filter(None, map(shutil.which, EMULATORS)), None)
    if found is None:
        pytest.skip("no emulator of 64-bit ARM: apt install qemu-user-static")
    return found


class Laid:
    """A ``moeopt_call`` and all that it points to, in one piece; addresses are places in it, told apart."""

    def __init__(self, address: int) -> None:
        words = array("q", ctypes.string_at(address, 34 * 8))
        _, spec, T, K, E, H, D = words[:7]
        assert not words[32], "rows that are kept are not sent back"
        self.parts, self.end, self.pointers = [], 34 * 8, []
        steps = words[23:30]
        words[1] = self.put(spec, 12 * 8 + 9 * 8)
        words[7] = self.put(words[7], _extent(words[8], (T, words[9]), (H, words[10])))
        words[11] = self.put(words[11], _extent(words[12], (T, words[13]), (K, words[14])))
        words[15] = self.put(words[15], _extent(words[16], (T, words[17]), (K, words[18])))
        self.y_bytes = T * D * BYTES[words[20]]
        self.y = words[19] = self.put(words[19], self.y_bytes)
        count = 1
        if words[22]:
            count = 1 + max(array("q", ctypes.string_at(words[22], E * 8)))
            words[22] = self.put(words[22], E * 8)
            self.pointers.append(22 * 8)
        entries = array("q", ctypes.string_at(words[21], count * 48 * 8))
        inside = []
        for first in range(0, len(entries), 48):
            inside += self.expert(entries, first, [(E - 1) * step for step in steps])
        words[21] = self.add(entries.tobytes())
        self.pointers += [words[21] + 8 * where for where in inside]
        self.pointers += [8 * where for where in (1, 7, 11, 15, 19, 21)]
        self.parts.insert(0, (0, words.tobytes()))

    def expert(self, words: array[int], first: int, beyond: list[int]) -> list[int]:
        """Put what the entry at ``first`` points to; returns which of its words are addresses."""
        found, widths = [], []
        for i in range(3):
            at = first + i * MATRIX
            data, dtype, out, into, so, si, scales, scale_dtype, ss, block, zeros, zs = words[at : at + MATRIX]
            widths.append(out)
            if not data:
                continue
            length = _extent(dtype, (out, so), (into, si))
            words[at] = self.put(data, length + beyond[i])
            found.append(at)
            if scales:
                blocks = -(-into // block)
                words[at + 6] = self.put(scales, _extent(scale_dtype, (out, ss), (blocks, 1)))
                found.append(at + 6)
            if zeros:
                words[at + 10] = self.put(zeros, _extent(5, (out, zs), (blocks, 1)))
                found.append(at + 10)
        for i, width in enumerate((widths[0], widths[1], widths[2], widths[2])):
            at = first + 3 * MATRIX + i * VECTOR
            data, dtype, stride = words[at : at + VECTOR]
            if data:
                words[at] = self.put(data, _extent(dtype, (width, stride)) + beyond[3 + i])
                found.append(at)
        return found

    def put(self, address: int, length: int) -> int:
        return self.add(ctypes.string_at(address, length), address % 64)

    def add(self, data: bytes, modulo: int = 0) -> int:
        """Where ``data`` lies: as far behind a whole cache line as it lay."""
        place = (self.end + 63) // 64 * 64 + modulo
        self.parts.append((place, data))
        self.end = place + len(data)
        return place

    def whole(self) -> bytes:
        out = bytearray(self.end)
        for place, data in self.parts:
            out[place : place + len(data)] = data
        return bytes(out)


def _extent(dtype: int, *axes: tuple[int, int]) -> int:
    """Bytes from the first element to the end of the last one."""
    last = sum((size - 1) * stride for size, stride in axes)
    return last // 2 + 1 if dtype == U4 else (last + 1) * BYTES[dtype] if all(size > 0 for size, _ in axes) else 0


def compiled() -> Path:
    """The program that runs calls, kept in the cache by what it was made of."""
    with tempfile.TemporaryDirectory() as aside:
        compiler = cross_compiler(Path(aside))
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=300, check=True).stdout
        path = build._folder() / f"arm-{compile.digest_of_sources(said, *compile.FLAGS, *ISAS, SERVER.read_text())}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with build._alone(path.parent):
            if not path.is_file():
                compile.compile_library(compiler, ISAS, Path(aside))  # as a user's compiler makes it, linked too
                objects = [str(made) for made in Path(aside).glob("*.o")]
                words = [compiler, "-O1", "-std=c++17", f"-I{build.SOURCES}", str(SERVER), *objects, "-static"]
                made = Path(aside) / "server"
                subprocess.run([*words, "-pthread", "-o", str(made)], check=True, capture_output=True, timeout=300)
                shutil.copy(made, f"{path}.aside")
                os.replace(f"{path}.aside", path)
    return path


class OtherCPU:
    """``run`` is a ``NativeRun``."""

    def __init__(self) -> None:
        words = [emulator(), str(compiled())]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        (isas,) = struct.unpack("q", self.process.stdout.read(8))
        assert isas == sum(compile.ISAS[isa] for isa in ISAS)

    def run(self, address: ctypes.c_void_p) -> int:
        laid = Laid(address.value)
        self.process.stdin.write(struct.pack("4q", laid.end, len(laid.pointers), laid.y, laid.y_bytes))
        self.process.stdin.write(array("q", laid.pointers).tobytes() + laid.whole())
        self.process.stdin.flush()
        (status,) = struct.unpack("q", self.process.stdout.read(8))
        y = self.process.stdout.read(laid.y_bytes)
        ctypes.memmove(array("q", ctypes.string_at(address.value, 34 * 8))[19], y, len(y))
        return status

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


assert call.ABI == 6, "the words of a call are numbered here as in this version of the interface"
