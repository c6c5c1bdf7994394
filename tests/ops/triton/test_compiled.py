"""The kernels compile for GPUs that are not here, without a spill, into the matrix instructions of each.

They are compiled by Triton and by NVIDIA's assembler, both in triton's wheel. Nothing is executed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed here")

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that one block may use, from the CUDA programming guide's table of compute capabilities."""

MATRIX = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
DTYPES = ("fp32", "fp16", "bf16")


def test_tiles_of_one_dtype(tmp_path):
    check(90, ["bf16"], tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("capability", MATRIX)
def test_every_tile_in_use(capability, tmp_path):
    check(capability, DTYPES, tmp_path)


def test_products_in_tf32_are_of_tensor_cores(tmp_path):
    for kernel in compiled(90, ["tf32"], tmp_path):
        assert kernel["spilled"] == 0 and kernel["mma"] and kernel["shared"] <= SHARED_MEMORY[90] * 1024, kernel


def compiled(capability, dtypes, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton.cross_compile", str(capability), *dtypes],
        capture_output=True, text=True, env=env, cwd=Path(__file__).parents[3], timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(capability, dtypes, tmp_path):
    kernels = compiled(capability, dtypes, tmp_path)
    assert {kernel["dtype"] for kernel in kernels} == set(dtypes)
    assert len(kernels) >= len(dtypes) * (2 * 2 + 6)
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability] * 1024, kernel
        if kernel["kernel"].startswith("gemv") or kernel["kernel"].startswith("tile"):
            assert kernel["vector_loads"] > 0, kernel
        if kernel["kernel"].startswith("tile") and kernel["dtype"] != "fp32":
            # a tile of 16 rows is below the 64 of wgmma and tcgen05
            assert (MATRIX[capability] if kernel["tile"][0] >= 64 else "mma.sync") in kernel["mma"], kernel
