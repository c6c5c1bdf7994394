"""What Triton's launcher makes of a call can be compiled, and fits the GPU; nothing is executed.

``test_compiled`` compiles signatures of its own making; here they are those of real calls.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.triton.constants import WeightTypes, function
from tests.ops.triton.test_compiled import MATRIX

pytest.importorskip("triton", reason="triton is not installed here")


def calls(tmp_path, *words):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error:TRITON:UserWarning", "-m", "tests.ops.triton.launched", *map(str, words)],
        capture_output=True, text=True, env=env, cwd=Path(__file__).parents[3], timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found):
    for call in found:
        assert not call["refused"] and len(call["started"]) == call["wanted"], call
    assert any(call["wanted"] for call in found)


def test_every_branch_of_the_kernels_fits_the_gpu_with_the_least_shared_memory(tmp_path):
    check(calls(tmp_path, 120, "fixed", 3))


@pytest.mark.nightly
@pytest.mark.parametrize("capability", MATRIX)
def test_every_branch_and_random_calls_on_every_gpu(capability, tmp_path):
    check(calls(tmp_path, capability, "fixed"))
    check(calls(tmp_path, capability, "random", 40))


def test_what_triton_refuses_is_a_reason_and_is_not_compiled_twice(tmp_path):
    few, many, again = [c for c in calls(tmp_path, 90, "twice", 0, 8) if "swish" in c["case"]]
    assert few["refused"] == "" and few["started"] == ["gemv_in", "gemv_out"]
    assert many["started"] == ["sort_pairs"] and again["started"] == []
    assert many["refused"] == again["refused"]
    assert many["refused"].startswith(
        "Triton does not compile or start the kernels here (OutOfResources: out of resource: shared memory, Required:"
    )


def test_each_field_is_a_constant_of_its_own_for_the_compiler():
    """Before 3.7, Triton's compiler takes a string of a constant tuple that is handed on for a value, and stops."""
    from triton import language as tl

    types = WeightTypes(torch.float16, torch.float16, False, False, False, True)
    args = ExpertsSpec(), torch.float16, torch.float16, types, False
    compiled, plain = function(*args, interpreted=False), function(*args, interpreted=True)
    assert all(isinstance(field, tl.constexpr) for field in compiled)
    assert [field.value for field in compiled] == list(plain)
    assert not any(isinstance(field, tl.constexpr) for field in plain)
