"""The kernel's own tests once more, on builds that stop at memory errors and undefined behaviour; run nightly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeopt.ops.native import build

ROOT = Path(__file__).parents[3]
RUN = """
import sys
from moeopt.ops.native import build
sanitize = "-fsanitize=address,undefined"
build._FLAGS = (*build._FLAGS, "-O1", "-g", sanitize, "-fno-sanitize=vptr", "-fno-sanitize-recover=all")
here = build.isas_here()
kept = [isa for isa in here if isa in ("avx2", here[-1])]  # two kinds of tiles; each takes a minute to compile so
build.isas_here, build.all_isas = (lambda: kept), (lambda: tuple(kept))
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' library is preloaded, as on Linux")
def test_under_address_and_undefined_sanitizers(tmp_path):
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip(build.how_to_get_one())
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_file():
        pytest.skip(f"{compiler} has no libasan.so: install the sanitizers' libraries")
    env = {
        **os.environ,
        "MOEOPT_CACHE": str(tmp_path),
        # Python's own allocations outlive it; the kernel's buffers are freed at each call
        "LD_PRELOAD": os.path.realpath(found),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "PYTHONMALLOC": "malloc",
    }
    # the exact roundings, all tiles and strides, isolation and threads; fork and the compilers' tests add nothing here
    tests = ["tests/ops/native/test_kernel.py", "tests/ops/native/test_isolation.py"]
    words = [sys.executable, "-c", RUN, "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", "not fork"]
    out = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert out.returncode == 0, (out.stdout + out.stderr)[-4000:]
