"""A block that talks to other processes is declined; a process group that it only holds is shared by the copy."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moeopt
from tests.toy_moe import Block, X, build, close


class Holds(Block):
    def __init__(self, group):
        super().__init__()
        self.group = group


class Sums(Holds):
    def forward(self, x):
        y = super().forward(x).contiguous()
        dist.all_reduce(y, group=self.group)
        return y


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_only_the_block_that_uses_the_group_is_declined(group):
    model = nn.Sequential(build(Sums, group=group), build(Holds, group=group)).eval()
    fast = moeopt.optimize(model, X, verify="fast")
    sums, holds = [b for b in fast.report.blocks if b.kind == "moe"]
    assert (holds.name, holds.status) == ("1", "rewritten") and sums.status == "declined"
    assert sums.reason.startswith(
        "its forward exchanges tensors with other processes (allreduce), and a block is checked"
    )
    assert "test_collectives.py:" in sums.source
    assert fast.model[1].group is group
    assert any(note.startswith("0.group (ProcessGroup) cannot be copied") for note in fast.report.notes)
    with torch.no_grad():
        close(fast(X), model(X))
