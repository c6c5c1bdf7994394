"""The builder's process may refuse, crash, hang or swell: an error with the block, and nothing of it is left behind.

A stand-in for the package plays each of these; the real one is asked where it is installed.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from moeopt.backends.tensorrt.build import Job, build_plan, stopped_at
from moeopt.backends.tensorrt.target import parse_target
from moeopt.errors import EngineBuildError
from moeopt.lower.onnx.lowerings.dense import Dense
from tests.backends.onnxrt.lowerings.one_site import make_site
from tests.backends.tensorrt.built import build_site

BLOCKS = ("a.experts", "b.experts")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """``build(mode, **fields)``: a build by the stand-in; temporary files go where the test can see them."""
    package, scratch = tmp_path / "package", tmp_path / "scratch"
    package.mkdir()
    scratch.mkdir()
    for name in ("tensorrt", "tensorrt_rtx"):
        shutil.copy(Path(__file__).with_name("fake_product.py"), package / f"{name}.py")
    monkeypatch.syspath_prepend(package)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    (tmp_path / "model.onnx").write_bytes(b"")

    def run(mode, say=lambda line: None, target="sm_89", **fields):
        (package / "mode").write_text(mode)
        job = Job(tmp_path / "model.onnx", tmp_path / "engine.plan", parse_target(target), [PROFILE], BLOCKS, **fields)
        try:
            return build_plan(job, say)
        finally:
            assert list(scratch.iterdir()) == [], "the builder's folder stays"

    run.plan = tmp_path / "engine.plan"
    return run


PROFILE = {"x": ((1, 4), (2, 4), (8, 4))}


def test_a_build(build, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    built = build("build")
    assert build.plan.read_bytes() == b"plan of build" and built.bytes == 13 and built.version == "9.9"
    assert [(x.name, x.type, x.nodes) for x in built.layers] == [("b.experts/up", "gemm", ("b.experts/up",))]
    assert built.activation_bytes == 512 and built.profiles == (PROFILE,) and built.seconds > 0
    assert built.inputs == ({"name": "x", "dtype": "FLOAT", "shape": [-1, 4]},)
    assert built.flags == (), "TF32 is off unless it is asked for"
    assert build("build", tf32=True).flags == ("TF32",)
    lines = []
    build("build", say=lines.append)
    assert lines == ["building the engine for sm_89 with tensorrt_rtx"]


def test_a_timing_cache_is_read_and_written_where_it_says_something(build, tmp_path):
    cache = tmp_path / "timing.cache"
    for want in (b"+", b"++"):
        build("build", target="sm_90", timing_cache=cache)
        assert cache.read_bytes() == want
    build("build", timing_cache=tmp_path / "other")
    assert not (tmp_path / "other").exists(), "TensorRT for RTX times nothing"


@pytest.mark.parametrize(
    ("mode", "fields", "words"),
    [
        ("refuse", {}, "does not take the graph at node b.experts/NonZero_3 (NonZero): NonZero plugin creator was not"),
        ("crash", {}, "crashed (SIGSEGV); the last it said was: V: Computing costs for b.experts/up"),
        (
            "hang",
            {"seconds": 3},  # it sleeps, and has this long to say its last line first
            "did not end within 3 seconds and was stopped; the last it said was: V: Comput",
        ),
        (
            "swell",
            {"bytes": 200_000_000},
            "took more than 0.20 GB of memory and was stopped; the last it said was: V:",
        ),
        ("exit", {}, "stopped with exit code 7"),
        ("none", {}, "does not build the graph: Cannot compile operation 'b.experts/up' for Ada"),
    ],
)
def test_what_goes_wrong_names_the_block(build, mode, fields, words):
    build.plan.write_bytes(b"an older plan")
    with pytest.raises(EngineBuildError) as err:
        build(mode, **fields)
    assert str(err.value).startswith("block b.experts: tensorrt_rtx, building for sm_89, ") and words in str(err.value)
    assert err.value.block == "b.experts" and (mode == "refuse" or "Computing costs" in err.value.log)
    assert build.plan.read_bytes() == b"an older plan"


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("silent", "crashed (SIGSEGV); the last it said was: V: region {a.experts/up...b.experts/up}"),
        ("no capability", "does not take the graph: the builder does not take sm_89"),
        (
            "no profile",
            "does not take the graph: the builder does not take the profile {'x': [[1, 4], [2, 4], [8, 4]]}",
        ),
        ("shape input", "the input x sets sizes by its values, which has no profile"),
    ],
)
def test_what_no_block_is_to_blame_for(build, mode, words):
    with pytest.raises(EngineBuildError) as err:
        build(mode)
    assert words in str(err.value) and err.value.block == "" and not build.plan.exists()


def test_a_package_that_is_gone(build, monkeypatch):
    monkeypatch.setattr("sys.path", [p for p in sys.path if "site-packages" not in p and "package" not in p])
    with pytest.raises(EngineBuildError, match="stopped with exit code 1; the last it said was: ModuleNotFoundError:"):
        build("build")


def test_whom_a_log_names():
    log = "V: one a.experts/up\nV: both a.experts/up b.experts/up\nV: another xa.experts/up\n"
    assert stopped_at(log, BLOCKS) == "a.experts"
    assert stopped_at(log + "E: at b.experts/down\nV: later a.experts/up\n", BLOCKS) == "b.experts"
    assert stopped_at("V: a.experts/up\nE: Cannot compile operation 'node_linear'\n", BLOCKS) == ""
    assert stopped_at("V: a.expertsX/up\nV: {ForeignNode[a.experts/up...n]}\n", BLOCKS) == ""


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the memory limit reads /proc")
def test_the_memory_limit_defaults_to_what_is_free(monkeypatch, build):
    monkeypatch.setattr("moeopt.backends.tensorrt.build._free_bytes", lambda: 1_000_000)
    with pytest.raises(EngineBuildError, match=r"took more than [\d.]+ [kM]B of memory"):
        build("hang")


def test_the_real_builder_gives_the_same_bytes_twice(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    site = make_site(E=4, H=16, I=16, dtype=torch.bfloat16)
    one = build_site(site, Dense())
    monkeypatch.setenv("A_LONG_ENVIRONMENT", "x" * 5000)  # it moves the stack of a process that inherits it
    two = build_site(site, Dense())
    assert one.sha256 == two.sha256 and one.bytes > 10_000
    assert [e["name"] for e in one.inputs] == ["x", "ids", "weights"] and one.outputs[0]["dtype"] == "BF16"
    assert one.inputs[0]["shape"] == [-1, 16] and one.flags == () and one.activation_bytes > 0
    assert any(x.type == "gemm" for x in one.layers)
