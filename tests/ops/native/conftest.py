"""The kernel with every instruction set that this machine runs; where no compiler is, these tests are skipped."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from moeopt.ops.native import build, compile, library, tiles
from moeopt.ops.native.call import call
from tests.ops.native.other_cpu import OtherCPU

TILE_UNIT = Path(__file__).with_name("tile_unit.h")


@pytest.fixture(scope="session")
def whole_library():
    """The path of a library with all instruction sets; from the cache where it has been built."""
    if build.find_compiler() is None:
        pytest.skip(f"the native kernel: {build.how_to_get_one()}")
    return build.build(build.all_isas())


def tiles_of_plain_code():
    """The path of a library whose tiles are ``tile_unit.h``, on the generic kernel; kept as the others are.

    What turns weights for them is compiled for this CPU, as it is for one that has tiles.
    """
    if build.find_compiler() is None or not compile.x86():
        pytest.skip("the kernel with tiles: it is compiled for x86-64")
    flags = (*build._FLAGS, "-O1", "-DMOEOPT_TILES_ON_GENERIC")
    own = *compile._ISA_FLAGS[here(None)[-1]], "-O3", f'-DMOEOPT_TILE_UNIT="{TILE_UNIT}"'
    name = compile.digest_of_sources(build._identity(build.find_compiler()), *flags, *own, TILE_UNIT.read_text())
    path = build._folder() / f"tiles-of-plain-code-{name}.so"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with build._alone(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as aside:
        if not path.is_file():
            isas = "generic", compile.TILES
            made = compile.compile_library(build.find_compiler(), isas, Path(aside), flags, build.SOURCES, own)
            os.replace(made, path)
    return path


@pytest.fixture(scope="session")
def plain_tiles():
    return tiles_of_plain_code()


def here(path):
    """The instruction sets that this machine runs; tiles only where the library of ``path`` is right with them."""
    isas = build.isas_here()
    with_tiles = path is not None and compile.TILES in isas and not tiles.wrong_in_a_child(path, compile.TILES)
    return isas if with_tiles else [isa for isa in isas if isa != compile.TILES]


class Kernel:
    """``kernel(*args)`` is the native result for one instruction set."""

    def __init__(self, path, isa, opened=library.opened):
        self.library = opened(path, isa)
        self.isa = isa

    def __call__(self, *args, threads=1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                return call(self.library.run, *args, self.library.bit)
        finally:
            torch.set_num_threads(before)


@pytest.fixture(scope="session")
def arm():
    """The kernel for 64-bit ARM, run by an emulator."""
    cpu = OtherCPU()
    yield cpu
    cpu.close()


ELSEWHERE = {compile.TILES, "neon"} - set(build.isas_here())


# avx512_vnni has the code of avx512 for floats and of avx512_bf16 for rows of 8 bits, with one test that these agree,
# and avx2_vnni that of avx2 for floats; where no tiles are, they are played, and test_tiles.py is the sample; NEON is
# emulated where it is not
def other_isas(*alike):
    return [
        pytest.param(isa, marks=pytest.mark.nightly if isa in ELSEWHERE else ())
        for isa in build.ISAS
        if isa not in alike
    ]


@pytest.fixture(params=other_isas("avx512_vnni", "avx2_vnni"))
def kernel(request, whole_library):
    return kernel_of(request, whole_library)


def kernel_of(request, whole_library):
    if request.param in here(whole_library):
        return Kernel(whole_library, request.param)
    if request.param == compile.TILES:
        return Kernel(request.getfixturevalue("plain_tiles"), compile.TILES)
    if request.param == "neon":
        cpu = request.getfixturevalue("arm")
        return Kernel(Path("emulated"), "neon", lambda path, isa: library.Library(path, isa, cpu.run))
    pytest.skip(f"this CPU has no {request.param}")


@pytest.fixture
def best(whole_library):
    """The kernel of the best instruction set."""
    return Kernel(whole_library, here(whole_library)[-1])
