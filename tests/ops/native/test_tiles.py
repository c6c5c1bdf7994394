"""Products of bfloat16 by the tiles of AMX: on a CPU that has them, and played in plain C++ on every other."""

import ctypes
import os
import shutil
import subprocess

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import StackedExpertWeights, experts_reference
from moeopt.ops.native import build, compile, library, tiles
from moeopt.ops.native.selfcheck import first_difference
from moeopt.ops.native.selfcheck import specs as all_fields
from tests.ops.native.blocks import Sizes, random_block
from tests.ops.native.conftest import Kernel
from tests.ops.native.test_kernel import far

EPS = torch.finfo(torch.bfloat16).eps
LAYOUTS = [("oi", "oi"), ("io", "io"), ("io", "oi")]


@pytest.fixture(params=["played", "real"])
def tiled(request):
    """The kernel with tiles."""
    if request.param == "played":
        return Kernel(request.getfixturevalue("plain_tiles"), compile.TILES)
    if compile.TILES not in build.isas_here():
        pytest.skip("this machine has no tiles of AMX")
    path = request.getfixturevalue("whole_library")
    assert not tiles.wrong_in_a_child(path, compile.TILES)
    return Kernel(path, compile.TILES)


@pytest.fixture
def played(plain_tiles):
    return Kernel(plain_tiles, compile.TILES)


def test_every_field_of_the_spec(tiled):
    for number, spec in enumerate(all_fields()):
        args = random_block(spec, Sizes(T=9 + 14 * (number % 3)), torch.bfloat16, seed=number, strange_ids=True)
        names = [n for n in (spec.compute_dtype, spec.act_dtype, spec.accum_dtype, spec.out_dtype) if n]
        eps = max(torch.finfo(d).eps for d in [torch.bfloat16, *(getattr(torch, n) for n in names)])
        assert far(tiled(*args), experts_reference(*args), eps) <= 1, spec


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_sizes_that_are_no_whole_tiles(tiled, layouts):
    """Around the 16 rows and 32 numbers of a tile, two tiles beside each other, and the 64 and 256 of a chunk."""
    spec = ExpertsSpec(w_in_layout=layouts[0], w_out_layout=layouts[1])
    sizes = [(1, 1, 1, 1), (2, 31, 33, 15), (15, 32, 15, 17), (16, 33, 16, 32), (17, 64, 17, 33), (31, 65, 31, 16),
             (32, 255, 40, 31), (33, 256, 65, 48), (64, 257, 64, 63), (65, 300, 63, 65),
             (130, 513, 260, 90)]  # fmt: skip
    for seed, (T, H, I, D) in enumerate(sizes):
        for stacked in (True, False):
            args = random_block(
                spec, Sizes(T, 1, 1 + seed % 2, H, I, D), torch.bfloat16, stacked=stacked, seed=5 + seed
            )
            assert far(tiled(*args), experts_reference(*args), EPS) <= 1, (T, H, I, D, stacked)


@pytest.mark.parametrize("rows", ["gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain"])
def test_whole_numbers_are_exact(tiled, rows):
    """Their sums are exact in any order, so each number is the reference's, bit for bit, wherever it lay in a tile."""
    for seed, (layouts, act) in enumerate([(LAYOUTS[0], None), (LAYOUTS[1], "float32"), (LAYOUTS[2], None)]):
        spec = ExpertsSpec(rows=rows, activation="relu", act_dtype=act, w_in_layout=layouts[0], w_out_layout=layouts[1])
        sizes = Sizes(T=(37, 20, 90)[seed], K=3, E=5, H=(300, 70, 45)[seed], I=45, D=37)
        args = random_block(spec, sizes, torch.bfloat16, seed=seed, strange_ids=True, whole_numbers=True)
        torch.testing.assert_close(tiled(*args), experts_reference(*args), rtol=0, atol=0)


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_a_token_s_bits_depend_on_no_number_of_rows(tiled, layouts):
    """The same tiles multiply one row and many, so that where a batch ends changes nothing."""
    spec = ExpertsSpec(w_in_layout=layouts[0], w_out_layout=layouts[1])
    sizes = Sizes(T=300, K=2, E=3, H=330, I=72, D=40)
    x, ids, weights, bank, _ = random_block(spec, sizes, torch.bfloat16, seed=15)
    whole = tiled(x, ids, weights, bank, spec)
    for count in (*range(1, 20), 33, 48, 65, 131):
        for rows in (slice(0, count), slice(300 - count, 300)):
            assert torch.equal(tiled(x[rows], ids[rows], weights[rows], bank, spec), whole[rows]), count
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for threads in (1, 3, 8):
        assert torch.equal(tiled(x[order], ids[order], weights[order], bank, spec, threads=threads), whole[order])


def test_what_is_not_finite_stays_in_its_token(tiled):
    """Rows of a tile, of x and of W, do not meet: a NaN of one token, and one in an expert that another token has."""
    for layouts in LAYOUTS:
        spec = ExpertsSpec(w_in_layout=layouts[0], w_out_layout=layouts[1])
        x, ids, weights, bank, _ = random_block(spec, Sizes(T=40, K=1, E=3, H=70, I=40, D=33), torch.bfloat16, seed=15)
        ids[:], ids[7] = 0, 2
        clean = tiled(x, ids, weights, bank, spec)
        x[3], x[21, 5] = torch.nan, torch.inf
        bank.w_in_s[0][2] = torch.nan  # and expert 1, which no token names, is not read
        bank.w_in_s[0][1] = torch.nan
        dirty = tiled(x, ids, weights, bank, spec)
        dirty_rows = {3, 7, 21}
        others = [t for t in range(40) if t not in dirty_rows]
        assert torch.equal(dirty[others], clean[others])
        assert not any(dirty[t].isfinite().all() for t in dirty_rows)


def test_subnormal_numbers_count_as_zero(tiled):
    """As the instruction has it, and oneDNN; it shows too that tiles are what multiplies, of each orientation of W."""
    for layout in ("oi", "io"):
        spec = ExpertsSpec(rows="plain", activation="identity", w_in_layout=layout, w_out_layout=layout)
        sizes = Sizes(T=3, K=1, E=1, H=64, I=64, D=64)
        x, ids, weights, bank, _ = random_block(spec, sizes, torch.bfloat16, biases=False)
        small = StackedExpertWeights([bank.w_in_s[0] * 2.0**-126], bank.w_out_s * 2.0**120)
        assert not tiled(x, ids, weights, small, spec).any()
        wide = StackedExpertWeights([w.float() for w in small.w_in_s], small.w_out_s.float())
        assert experts_reference(x.float(), ids, weights.float(), wide, spec).any()


def test_a_thread_gives_its_tiles_back(played):
    """A system keeps 8 KiB more of each thread that has them."""
    in_use = ctypes.CDLL(str(played.library.path)).tiles_are_in_use
    args = random_block(ExpertsSpec(), Sizes(T=40), torch.bfloat16)
    played(*args)
    assert in_use() == 0


def test_the_check_at_load_finds_what_tiles_do_wrong(tiled, monkeypatch):
    """And passes what is right: rows of a second tile, and a token alone."""
    from moeopt.ops.native import selfcheck

    assert first_difference(tiled.library.run, tiled.library.bit) == ""
    honest = selfcheck.call

    def lost(run, x, *rest):
        y = honest(run, x, *rest)
        y[32:] = 0
        return y

    def other_bits(run, x, *rest):
        y = honest(run, x, *rest)
        return y.nextafter(torch.full_like(y, 9.0)) if len(y) > 32 else y

    for damage, said in (
        (lost, "bfloat16, 70 rows: .* apart"),
        (other_bits, "a token alone is not what it is among 70"),
    ):
        monkeypatch.setattr(selfcheck, "call", damage)
        with pytest.raises(library.NoLibrary, match=said):
            library.checked(tiled.library)


def compiled(tmp_path, body):
    """A library of this interface that does what ``body`` says, whatever it is asked."""
    (tmp_path / "made.c").write_text(
        f"#include <stdint.h>\nint64_t moeopt_abi(void) {{ return {library.ABI}; }}\n"
        f"int64_t moeopt_isas(void) {{ return {body.get('isas', sum(compile.ISAS.values()))}; }}\n"
        f"int64_t moeopt_tiles(void) {{ return {body.get('tiles', 0)}; }}\n"
        f"int64_t moeopt_experts(const void *call) {{ {body.get('experts', 'return 0;')} }}\n"
    )
    words = [build.find_compiler(), "-x", "c", "-shared", "-fPIC", "made.c", "-o", "made.so"]
    subprocess.run(words, cwd=tmp_path, check=True)
    return tmp_path / "made.so"


@pytest.mark.one_isa
def test_a_fault_ends_a_child_and_not_this_process(plain_tiles, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "_asked", {})
    faulty = compiled(tmp_path, {"experts": "__builtin_trap();"})
    with pytest.raises(library.NoLibrary, match=r"it ends the process that runs it \(signal \d+\)"):
        library.proved(faulty, compile.TILES)
    assert not (tmp_path / "cache").exists(), "what was wrong is asked again by the next process"
    assert library.proved(plain_tiles, compile.TILES).isa == compile.TILES
    monkeypatch.setattr(tiles, "_asked", {})
    monkeypatch.setattr(tiles, "ask_child", lambda *args: "asked again")
    assert library.proved(plain_tiles, compile.TILES).isa == compile.TILES
    other = shutil.copy(plain_tiles, tmp_path / "other.so")
    with pytest.raises(library.NoLibrary, match="asked again"):
        library.proved(tmp_path / other, compile.TILES)


@pytest.mark.one_isa
def test_what_a_child_says(tmp_path, monkeypatch):
    def child(code):
        monkeypatch.setattr(tiles, "_CHILD", code)
        return tiles.ask_child(tmp_path, compile.TILES)

    assert child("print('good')") == ""
    assert child("import sys; sys.exit('lib.so computes something else')").endswith("lib.so computes something else")
    assert child("pass") == "in a process of its own, it says nothing"
    ends = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    assert child(ends) == "it ends the process that runs it (signal 4)"
    monkeypatch.setattr(tiles, "SECONDS", 0.1)
    assert child("import time; time.sleep(60)") == "it could not be tried in a process of its own (TimeoutExpired)"


@pytest.mark.one_isa
@pytest.mark.parametrize(
    ("tiles_here", "said"),
    [(1, "this CPU or its system has no tiles for bfloat16"), (2, "the system refuses this process AMX's tiles")],
)
def test_without_permission_the_library_says_so(whole_library, tmp_path, tiles_here, said):
    with pytest.raises(library.NoLibrary, match=said):
        library.opened(compiled(tmp_path, {"isas": 31, "tiles": tiles_here}), compile.TILES)


@pytest.fixture
def cpu(monkeypatch, plain_tiles):
    """A machine whose instruction sets are ``generic`` and tiles, and a library with both."""
    monkeypatch.delenv("MOEOPT_NATIVE_ISA", raising=False)
    monkeypatch.setattr(library, "isas_here", lambda: ["generic", compile.TILES])
    monkeypatch.setattr(library, "built_library", lambda isa: plain_tiles)
    monkeypatch.setattr(library, "wrong_in_a_child", lambda path, isa: "")
    return monkeypatch


@pytest.mark.one_isa
def test_tiles_are_taken_where_they_are_right(cpu):
    found = library.load()
    assert (found.isa, found.passed_over) == (compile.TILES, "")


@pytest.mark.one_isa
def test_tiles_that_are_wrong_leave_the_instruction_set_below_and_say_why(cpu):
    cpu.setattr(library, "wrong_in_a_child", lambda path, isa: "it ends the process that runs it (signal 4)")
    found = library.load()
    assert found.isa == "generic"
    assert found.passed_over == "amx_bf16 is not used: it ends the process that runs it (signal 4)"
    cpu.setattr(library, "_found", found)
    assert library.describe().endswith("; amx_bf16 is not used: it ends the process that runs it (signal 4)")
    cpu.setattr(library, "build_all", lambda: (found.path, ("generic", compile.TILES)))
    assert library.build_ahead()[1] == {
        "generic": "checked against the reference",
        compile.TILES: "built, not used: it ends the process that runs it (signal 4)",
    }
    cpu.setenv("MOEOPT_NATIVE_ISA", compile.TILES)
    with pytest.raises(library.NoLibrary, match="it ends the process"):
        library.load()


@pytest.mark.one_isa
def test_tiles_that_a_system_keeps_back_are_told_of(cpu):
    cpu.setattr(library, "isas_here", lambda: ["generic"])
    assert library.load().passed_over == ""
    cpu.setattr(library, "cpu_has_tiles", lambda: True)
    assert library.load().passed_over.startswith("amx_bf16 is not used: the system keeps no tiles for this process")


@pytest.mark.one_isa
def test_a_wheel_s_lesser_library_runs_where_nothing_can_be_built(cpu, plain_tiles):
    def none(isa):
        raise build.BuildError("no C++ compiler was found")

    cpu.setattr(library, "built_library", none)
    cpu.setattr(library, "prebuilt", lambda isa: plain_tiles if isa == "generic" else None)
    found = library.load()
    assert (found.isa, found.passed_over) == ("generic", "amx_bf16 is not used: no C++ compiler was found")
    cpu.setattr(library, "prebuilt", lambda isa: None)
    with pytest.raises(library.NoLibrary, match="^no C.* compiler was found$"):
        library.load()


@pytest.mark.one_isa
def test_the_real_instructions_are_compiled(tmp_path, whole_library):
    """This needs no CPU that runs them, but a compiler that knows them."""
    if not compile.x86():
        pytest.skip("they are those of x86-64")
    words = [build.find_compiler(), *compile.FLAGS, *compile._AMX]
    known = subprocess.run([*words, "-x", "c++", "-fsyntax-only", os.devnull], capture_output=True)
    if known.returncode:
        pytest.skip("this compiler does not know AMX")
    source = str(build.SOURCES / "tiles.cpp")
    warned = subprocess.run([*words, "-Wall", "-Wextra", "-fsyntax-only", source], capture_output=True, text=True)
    assert warned.returncode == 0 and not warned.stderr, warned.stderr
    text = subprocess.run([*words, "-S", "-o", "-", source], capture_output=True, text=True, check=True).stdout
    for name in ("tdpbf16ps", "ldtilecfg", "tileloadd", "tilestored", "tilezero", "tilerelease", "xgetbv", "syscall"):
        assert name in text, name
    if compile.TILES not in build.isas_here():
        with pytest.raises(library.NoLibrary, match="no tiles for bfloat16|refuses this process AMX's"):
            library.opened(whole_library, compile.TILES)
