"""Every rewritten zoo model on two ranks that share its tokens: the outputs of one process, in bits under ``exact``.

Not in bits in float64: PyTorch's products, which may be quickest there, round a row by how many stand beside it.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import moeopt
import moeopt.distributed
from tests.distributed.ranks import run_ranks
from tests.helpers import assert_same, run, tensors
from tests.zoo import CASES

NAMES = sorted(name for name, one in CASES.items() if one.expect == "rewritten" and one.moe != 0)  # dense: one expert
UNDIVIDED = {"around_experts_shared_by_layers"}
"""Whose experts the model has under several names."""


def on_ranks(rank, size, names, exact):
    """{name: why it was refused, or ""}; a difference is an error."""
    mesh, found = DeviceMesh("cpu", list(range(size))), {}
    for name in names:
        case = CASES[name]
        args, kwargs = case.inputs()
        opt = moeopt.optimize(case.build(), kwargs or args, verify="off")
        dist.barrier()
        try:
            d = moeopt.distribute(opt, mesh, tokens="replicated", exact=exact, timeout=120)
        except moeopt.UsageError as err:
            found[name] = str(err)
            continue
        for i in range(2):
            want = run(opt, case.fresh(i))
            double = any(t.dtype == torch.float64 for t in tensors(want))
            assert_same(run(d, case.fresh(i)), want, exact=exact and not double)
        found[name] = ""
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("exact", (True, False))
@pytest.mark.parametrize("part", range(8))
def test_the_zoo_on_two_ranks(part, exact):
    takes_one_kind = [n for n in NAMES if not all(CASES[n].inputs())]  # optimize takes arguments of one kind
    for found in run_ranks(on_ranks, 2, takes_one_kind[part::8], exact, deadline=1200.0):
        refused = {name: why for name, why in found.items() if why}
        assert set(refused) <= UNDIVIDED, refused
        assert torch.tensor([not why for why in found.values()]).any()
