"""Random programs with their experts on two ranks: what one process gives, in bits where one kernel gives them."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import moeopt
import moeopt.distributed
from tests.distributed.ranks import run_ranks
from tests.helpers import assert_same, run
from tests.property.build import build, inputs
from tests.property.run import drawn_one
from tests.property.wide import wide_programs

UNDIVIDED = "there is nothing to distribute: no rewritten block has experts that can be divided"
BITWISE = ("float32", "bfloat16")
"""Whose kernel gives a row the same bits whatever rows stand beside it; PyTorch's products in float64 do not."""
CALLS = 3
"""Of each program; with split tokens each rank has another one, of other sizes."""


def on_ranks(rank, size, numbers):
    """{number: why the program was refused, or ""}; a difference is an error."""
    mesh, found = DeviceMesh("cpu", list(range(size))), {}
    for number in numbers:
        p = drawn_one(wide_programs(), number)
        opt = moeopt.optimize(build(p), inputs(p, 0), verify="off")
        found[number] = ""
        for tokens, exact in (("replicated", True), ("split", True), ("split", False)):
            dist.barrier()
            try:
                d = moeopt.distribute(opt, mesh, tokens=tokens, exact=exact, timeout=120)
            except moeopt.UsageError as err:
                found[number] = str(err)
                break
            for i in range(CALLS):
                call = inputs(p, (i + rank) % CALLS if tokens == "split" else i), {}
                want, got = run(opt, call), run(d, call)
                try:
                    assert_same(got, want, exact=exact and p.dtype in BITWISE)
                except AssertionError as wrong:
                    raise AssertionError(f"{p!r}, {tokens} tokens, exact={exact}, call {i}: {wrong}") from wrong
    return found


PARTS = [[500_001, 500_003]] + [
    pytest.param([*range(first, first + 10)], marks=pytest.mark.nightly) for first in range(700_000, 700_040, 10)
]


@pytest.mark.parametrize("numbers", PARTS, ids=lambda numbers: str(numbers[0]))
def test_random_programs_on_two_ranks(numbers):
    for found in run_ranks(on_ranks, 2, numbers, deadline=1200.0):
        refused = {number: why for number, why in found.items() if why}
        assert all(why.startswith(UNDIVIDED) for why in refused.values()), refused
        assert len(refused) < len(numbers)
