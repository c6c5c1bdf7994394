"""All C++ once more, on builds that stop at memory errors and undefined behaviour: the kernel and the operator.

The default run takes the widest instruction set that is here; ``MOEOPT_NIGHTLY=1`` takes AVX2's kind of tiles too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeopt.ops.native import build

ROOT = Path(__file__).parents[3]
NIGHTLY = os.environ.get("MOEOPT_NIGHTLY") == "1"
RUN = f"""
import sys
NIGHTLY = {NIGHTLY}
from moeopt.ops.native import build, compile, library
sanitize = "-fsanitize=address,undefined"
build._FLAGS = (*build._FLAGS, "-O0", "-g1", sanitize, "-fno-sanitize=vptr", "-fno-sanitize-recover=all")
here = build.isas_here()
compile.SECONDS = 1800  # of one compiler, which others may slow down
# each takes 7 s to compile so, and 25 s with -O1
kept = [isa for isa in here if NIGHTLY and isa == "avx2" or isa in compile.with_what_it_needs(here[-1])]
build.isas_here, build.all_isas = (lambda: kept), (lambda: tuple(kept))
# of the others no case is made: it would be skipped, and be the one case of the day that has a value
build.ISAS = {{isa: bit for isa, bit in library.ISAS.items() if isa in (*kept, compile.TILES)}}
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
LEFT_OUT = () if NIGHTLY else ("-m", "not nightly")
EACH_VALUE = () if NIGHTLY else ("-m", "not nightly and not one_isa")
"""Of a test with several parameters (layout, dtype, a size around a tile): each value of each, not each combination."""
PARTS = "kernel", "by_lane", "kept", "isolation", "codes", "rounded", "tiles"
ALONE = "fork", "a_fault", "openmp_before", "keeps_back", "real_instructions", "lesser_library"
"""Processes and compilers, not memory."""
KERNEL = [f"tests/ops/native/test_{part}.py" for part in PARTS] + ["-k", f"not {' and not '.join(ALONE)}", *EACH_VALUE]
OPERATOR = ["tests/backends/onnxrt/lowerings/test_native.py", "tests/backends/onnxrt/test_custom_op.py", "-k",
            "lowerings or this_machine or two_sessions", *LEFT_OUT]  # fmt: skip


def _preloaded(compiler):
    """The sanitizers' library, and C++'s own: without the second, the first finds no ``throw`` to watch."""
    for name in ("libasan.so", "libstdc++.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_file():
            pytest.skip(f"{compiler} has no {name}: install the sanitizers' libraries")
        yield os.path.realpath(found)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """``sanitized(tests)`` runs them in a process whose kernel is built so."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip(build.how_to_get_one())
    env = {
        **os.environ,
        "MOEOPT_CACHE": str(tmp_path_factory.mktemp("sanitized")),
        # Python's own allocations outlive it; the kernel's buffers are freed at each call
        "LD_PRELOAD": " ".join(_preloaded(compiler)),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "PYTHONMALLOC": "malloc",
    }

    def run(tests):
        words = [sys.executable, "-c", RUN, "-q", "-x", "-p", "no:cacheprovider", *tests]
        out = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=3000)
        return out.returncode, (out.stdout + out.stderr)[-4000:]

    return run


pytestmark = [
    pytest.mark.slow,
    pytest.mark.one_isa,  # the builds are the same ones: what a lesser CPU is played by changes torch, not the kernel
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' library is preloaded, as on Linux"),
]


def test_the_kernel_under_address_and_undefined_sanitizers(sanitized):
    """The exact roundings, all tiles and strides, isolation and threads; fork and the compilers' tests add nothing."""
    status, said = sanitized(KERNEL)
    assert status == 0, said


def test_the_operator_under_address_and_undefined_sanitizers(sanitized):
    """Right and wrong nodes, calls, ids and weights in ONNX Runtime, and its proof in a child process."""
    status, said = sanitized(OPERATOR)
    assert status == 0, said
