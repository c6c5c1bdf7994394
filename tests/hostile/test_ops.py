"""No op that a graph may name ends the process, hangs or takes more memory than it may, whatever it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeopt.bundle.checked_ops import CHECKED
from moeopt.bundle.op_allowlist import OPS, guarded, name_of, op_named
from moeopt.errors import BundleError

ROOT = Path(__file__).parents[2]
NAMES = sorted(OPS)
IN_CI = sorted({*NAMES[::40], *CHECKED} & OPS)


def attacked(trials: int, names: list[str]) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.attack_ops", str(trials)],
        input=json.dumps(names), text=True, capture_output=True, cwd=ROOT, check=True,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["op"] for result in results] == names
    return results


def test_a_sample_of_ops_survives():
    assert not [r for r in attacked(60, IN_CI) if r["ended"]]


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(8))
def test_every_op_survives(part):
    assert not [r for r in attacked(1000, NAMES[part::8]) if r["ended"]]


def test_the_attack_finds_ops_that_believe_what_they_are_told():
    """The same attack on torch's own ops, without the checks."""
    names = ["aten._reshape_alias.default", "aten.native_batch_norm.default", "aten._fft_r2c.default"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.attack_ops", "600", "--raw", *names],
        text=True, capture_output=True, cwd=ROOT, check=True,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [r["ended"] for r in results] == ["SIGSEGV"] * 3


def test_every_name_is_an_op_of_this_torch():
    for name in NAMES:
        assert name_of(op_named(name)) == name


KNOWN_BAD = (
    "segment_reduce.default ctc_loss.IntList lstm.data embedding_bag.default set.source_Tensor "
    "as_strided_scatter.default _scaled_mm.default _cdist_forward.default max_unpool2d.default "
    "histogramdd.default linalg_svd.default put.default"
).split()


@pytest.mark.parametrize("name", KNOWN_BAD)
def test_ops_that_check_nothing_are_not_to_be_named(name):
    with pytest.raises(BundleError, match=r"is not one that a bundle may call|does not exist in torch"):
        op_named(f"aten.{name}")


X = torch.arange(12.0).reshape(3, 4)
REFUSED = {
    "beyond its tensor": ("aten.as_strided.default", [X[:2], [12], [1]], "elements beyond its tensor's"),
    "before its tensor": ("aten.as_strided.default", [X[1:], [2], [1], 0], "elements beyond its tensor's"),
    "short statistics": (
        "aten.native_batch_norm.default", [X, None, None, X[0, :2], X[0, :2], False, 0.1, 1e-5], "a mean of shape",
    ),
    "the least integer": (
        "aten.div.Tensor_mode", [torch.full((2,), -(1 << 63)), torch.tensor([-1, 1])], "the least integer and -1",
    ),
    "longer values": (
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        [torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 9, 4)], "that do not fit",
    ),
    "groups beyond the rows": (
        "aten._grouped_mm.default", [torch.ones(4, 8), torch.ones(2, 8, 8), torch.tensor([2, 9], dtype=torch.int32)],
        "lie beyond 4 rows",
    ),
    "a dimension that is not there": ("aten._fft_r2c.default", [X, [7], 0, True], "dimensions [7] of shape (3, 4)"),
    "norms that do not fit": ("aten._weight_norm.default", [X, X[:, :2], 0], "6 norms for 3 slices"),
    "weights that do not fit": (
        "aten.rnn_tanh.input", [torch.ones(2, 3, 4), torch.ones(1, 3, 4), [X], True, 1, 0.0, False, False, False],
        "1 weights that do not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_checked_op_refuses(case):
    name, args, text = REFUSED[case]
    with pytest.raises(BundleError) as err:
        guarded(name)(*args, **({"rounding_mode": "trunc"} if "div" in name else {}))
    assert text in str(err.value) and str(op_named(name)) in str(err.value)


def test_memory_that_was_not_written_is_not_to_be_read():
    left = torch.full((1 << 16,), 7.0)
    del left
    assert not guarded("aten.empty.memory_format")([1 << 16]).any()
    assert not guarded("aten.new_empty.default")(X, [1 << 16]).any()


def test_a_checked_op_gives_what_the_op_gives():
    assert torch.equal(guarded("aten.as_strided.default")(X, [4], [3]), X.as_strided([4], [3]))
    assert torch.equal(guarded("aten.floor_divide.default")(X.long(), torch.tensor(5)), X.long() // 5)
    for got, want in zip(guarded("aten.median.dim")(X.expand(2, 3, 4), 1), X.expand(2, 3, 4).median(1), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("operator.mul", [1 << 40, 1 << 40], "does not fit 64 bits"),
        ("operator.mul", [[1, 2], 1 << 40], "takes numbers, not list, int"),
        ("operator.mul", ["ab", 3], "takes numbers, not str, int"),
        ("operator.add", [X, X], "takes numbers, not Tensor, Tensor"),
        ("operator.getitem", [X, 0], "takes an item of a list by its number"),
    ],
)
def test_arithmetic_is_on_numbers(name, args, text):
    with pytest.raises(BundleError) as err:
        guarded(name)(*args)
    assert text in str(err.value)
