"""How the kernel comes to be: built once, by whom it may be, from what is there, and what is said where it is not."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import moeopt
from moeopt.errors import NativeKernelWarning, UsageError
from moeopt.ops import experts, experts_reference
from moeopt.ops.native import build, compile, library
from tests.ops.cases import make
from tests.toy_moe import X
from tests.toy_moe import build as toy

pytestmark = pytest.mark.one_isa  # how the kernel is built


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has loaded no kernel, and a cache of its own."""
    monkeypatch.setenv("MOEOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_found", None)
    cached = build.find_compiler, build._identity
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def case():
    return make(moeopt.ir.specs.ExpertsSpec(), dtype=torch.float32)


def works_without(text):
    """The op runs without the kernel, warns once with ``text``, and the report says it too."""
    some = case()
    with pytest.warns(NativeKernelWarning, match=text) as seen:
        y = experts(*some.args)
    torch.testing.assert_close(y, experts_reference(*some.args), rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", NativeKernelWarning)  # once is enough
        experts(*some.args)
        opt = moeopt.optimize(toy(), X, verify="fast")
    (note,) = [n for n in opt.report.notes if "native kernel" in n]
    assert note.startswith("the experts run on torch's matmuls, not on the faster native kernel: ")
    assert library.missing() in note and library.missing() in library.describe()


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    works_without("the native CPU kernel is not used, torch's matmuls are: no C.* compiler was found; install one")


def test_a_compiler_that_is_named_and_not_there(fresh, monkeypatch):
    monkeypatch.setenv("MOEOPT_CXX", "/nowhere/c++")
    works_without("MOEOPT_CXX or CXX names '/nowhere/c.*', which is not on the path: correct or unset it")


@pytest.mark.skipif(os.name != "posix", reason="compilers here are shell scripts")
def test_a_compiler_that_refuses(fresh, monkeypatch):
    monkeypatch.setenv("MOEOPT_CXX", script(fresh, "broken", 'echo "x.cpp:1: error: out of luck"; exit 1'))
    works_without("could not compile the kernel .*error: out of luck.*name another compiler with MOEOPT_CXX")
    assert not list((fresh / "cache" / "native").glob("building-*")), "nothing half built is left"


@pytest.mark.skipif(os.name != "posix", reason="compilers here are shell scripts")
def test_a_compiler_that_never_ends(fresh, monkeypatch):
    monkeypatch.setenv(
        "MOEOPT_CXX", script(fresh, "slow", 'case "$1" in --version) echo slow;; *) exec sleep 1000;; esac')
    )
    for module in (build, compile):
        monkeypatch.setattr(module, "SECONDS", 0.2)
    works_without("took longer than 0.2 s; set MOEOPT_NATIVE=off to do without")


def test_a_cache_that_cannot_be_written(fresh, monkeypatch, whole_library):
    (fresh / "file").write_text("")
    monkeypatch.setenv("MOEOPT_CACHE", str(fresh / "file"))
    works_without("cannot be written to .*; name another folder with MOEOPT_CACHE")


def test_a_library_that_is_none(fresh, monkeypatch):
    (fresh / "text.so").write_text("no library")
    monkeypatch.setattr(library, "built_library", lambda isa: fresh / "text.so")
    works_without("text.so cannot be loaded .*; remove it, and it is built anew")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner here")
def test_a_library_of_another_user_is_not_loaded(fresh, monkeypatch, whole_library):
    monkeypatch.setenv("MOEOPT_CACHE", str(whole_library.parents[1]))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    if whole_library.stat().st_uid == 0:
        monkeypatch.setattr(build, "_ROOT", 4243)
    works_without("belongs to another user and is not loaded; remove it, or set MOEOPT_CACHE")


def test_off_is_silent(fresh, monkeypatch):
    monkeypatch.setenv("MOEOPT_NATIVE", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts(*case().args)
    assert library.library() is None and library.missing() == ""
    assert library.describe() == "off (MOEOPT_NATIVE)" and not (fresh / "cache").exists()


def test_an_instruction_set_that_is_none(fresh, monkeypatch):
    monkeypatch.setenv("MOEOPT_NATIVE_ISA", "avx1024")
    with pytest.raises(UsageError, match="MOEOPT_NATIVE_ISA is 'avx1024'; it must be one of generic, avx2"):
        library.load()
    monkeypatch.setenv("MOEOPT_NATIVE", "perhaps")
    with pytest.raises(UsageError, match="MOEOPT_NATIVE is 'perhaps'; it must be on or off"):
        library.load()


def test_an_instruction_set_that_this_cpu_lacks(fresh, monkeypatch):
    monkeypatch.setattr(library, "isas_here", lambda: ["generic"])
    monkeypatch.setenv("MOEOPT_NATIVE_ISA", "avx512")
    with pytest.raises(library.NoLibrary, match="MOEOPT_NATIVE_ISA is avx512, and this CPU runs generic"):
        library.load()


def test_the_user_s_choice_is_played(monkeypatch, whole_library):
    monkeypatch.setattr(library, "_found", None)
    for isa in build.isas_here():
        monkeypatch.setenv("MOEOPT_NATIVE_ISA", isa)
        assert library.load().isa == isa
    monkeypatch.delenv("MOEOPT_NATIVE_ISA")
    assert library.load().isa == build.isas_here()[-1] and library.load().path == whole_library


def test_a_compiler_too_old_for_the_best_builds_a_lesser_one(monkeypatch, whole_library):
    here = build.isas_here()
    if len(here) < 2:
        pytest.skip("this CPU has one instruction set")

    def too_old(isa):
        if isa == here[-1]:
            raise build.CompileError("g++ could not compile the kernel (error: unrecognized option)")
        return whole_library

    monkeypatch.setattr(library, "built_library", too_old)
    assert library.load().isa == here[-2]


def test_where_neon_is_wrong_the_plain_kernel_runs(monkeypatch, whole_library):
    """It was run under emulation only."""
    honest = library.proved

    def proved(path, isa):
        if isa == "neon":
            raise library.NoLibrary("it computes something else than the reference here")
        return honest(path, isa)

    monkeypatch.setattr(library, "isas_here", lambda: ["generic", "neon"])
    monkeypatch.setattr(library, "built_library", lambda isa: whole_library)
    monkeypatch.setattr(library, "proved", proved)
    found = library.load()
    assert found.isa == "generic"
    assert found.passed_over == "neon is not used: it computes something else than the reference here"
    monkeypatch.setattr(library, "build_all", lambda: (whole_library, ("generic", "neon")))
    assert library.build_ahead()[1] == {
        "generic": "checked against the reference",
        "neon": "built, not used: it computes something else than the reference here",
    }


def test_build_all_leaves_out_what_the_compiler_does_not_know(monkeypatch, tmp_path):
    asked = []

    def old(isas):
        asked.append(isas)
        if len(isas) > 1:
            raise build.CompileError("error: unrecognized option")
        return tmp_path

    monkeypatch.setattr(build, "build", old)
    assert build.build_all() == (tmp_path, ("generic",))
    assert [len(isas) for isas in asked] == list(range(len(build.all_isas()), 0, -1))


def test_a_compiler_without_avx_vnni_makes_code_of_avx2_in_its_place(monkeypatch, tmp_path):
    """GCC 10 knows AVX-512 BF16 and not AVX-VNNI: the instruction sets behind it are not lost for that."""
    commands = []
    monkeypatch.setattr(compile, "_run_all", commands.extend)
    monkeypatch.setattr(compile, "_knows", lambda compiler, flag: flag != "-mavxvnni")
    compile.compile_library("g++", ("avx2_vnni", "avx512"), tmp_path)
    (made,) = [words for words in commands if "-DMOEOPT_KERNELS=kernels_avx2_vnni" in words]
    assert "-mavx2" in made and "-mavxvnni" not in made and any("-mavx512f" in words for words in commands)


def test_a_compiler_is_asked_what_it_knows(whole_library):
    assert compile._knows(build.find_compiler(), "-O2")
    assert not compile._knows(build.find_compiler(), "-mno-such-instructions")


def test_two_processes_build_at_once(tmp_path, whole_library):
    code = "from moeopt.ops.native import build; build._FLAGS += ('-O0',); print(build.build(('generic',)))"
    env = {**os.environ, "MOEOPT_CACHE": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    told = [p.communicate(timeout=300)[0].strip() for p in started]
    assert [p.returncode for p in started] == [0, 0] and told[0] == told[1]
    assert sorted(p.name for p in (tmp_path / "native").iterdir()) == ["lock", os.path.basename(told[0])]
    library.opened(build.Path(told[0]), "generic")


def test_other_sources_are_another_library(monkeypatch, tmp_path, whole_library):
    compiler = build.find_compiler()
    names = {build.library_name(compiler, ("generic",)), build.library_name(compiler, ("generic", "avx2"))}
    changed = tmp_path / "src"
    changed.mkdir()
    for path in build.SOURCES.iterdir():
        (changed / path.name).write_text(path.read_text() + "// changed\n")
    monkeypatch.setattr(build, "SOURCES", changed)
    build._identity.cache_clear()
    try:
        names.add(build.library_name(compiler, ("generic",)))
    finally:
        build._identity.cache_clear()
    assert len(names) == 3


def test_our_sources_compile_without_a_warning(whole_library):
    """GCC's headers of vector intrinsics warn, so this is the generic build."""
    words = [
        build.find_compiler(),
        "-std=c++17",
        "-O2",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-attributes",
    ]
    for source in ("isa.cpp", "isa64.cpp", "experts.cpp", "pool.cpp", "ort_op.cpp"):
        out = subprocess.run([*words, str(build.SOURCES / source)], capture_output=True, text=True)
        assert out.returncode == 0 and not out.stderr, out.stderr


def test_the_interface_is_plain_c(tmp_path, whole_library):
    """What a program in C, or a custom op of a runtime, includes."""
    compiler = build.find_compiler()
    (tmp_path / "user.c").write_text(
        '#include "moeopt_experts.h"\nint64_t (*f)(const moeopt_call *) = moeopt_experts;\n'
    )
    words = [compiler, "-x", "c", "-std=c99", "-Wall", "-Werror", "-fsyntax-only", f"-I{build.SOURCES}"]
    out = subprocess.run([*words, str(tmp_path / "user.c")], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_a_wheel_s_library_is_taken_before_a_compiler_is_asked(tmp_path, monkeypatch):
    from moeopt.ops.native import compile as commands

    monkeypatch.setattr(commands, "PREBUILT", tmp_path)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    isas = commands.all_isas()
    with pytest.raises(build.BuildError):
        build.built_library(isas[0])
    (tmp_path / commands.prebuilt_name(isas[:1])).touch()
    assert build.built_library(isas[0]) == tmp_path / commands.prebuilt_name(isas[:1])
    for isa in isas[1:]:  # which the compiler of the wheel did not know
        with pytest.raises(build.BuildError):
            build.built_library(isa)
    (tmp_path / "moeopt-experts-0123456789abcdef-generic.so").touch()  # of other sources
    (tmp_path / commands.prebuilt_name(isas[:1])).unlink()
    with pytest.raises(build.BuildError):
        build.built_library(isas[0])
