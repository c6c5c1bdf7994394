"""A sparse tensor in a model ends the reading of the block that makes it, and of no other."""

import torch
from torch import nn

import moeopt
from tests.zoo.dispatches import D, MaskedSelect, SparseCombine


class SparseBefore(nn.Module):
    """A layer that multiplies by a sparse matrix, before an ordinary mixture."""

    def __init__(self):
        super().__init__()
        self.moe = MaskedSelect()

    def forward(self, x):
        return self.moe(torch.sparse.mm(torch.eye(len(x)).to_sparse(), x))


def test_only_its_own_block_is_declined():
    torch.manual_seed(0)
    chain = nn.Sequential(SparseBefore(), SparseCombine()).eval()
    x = torch.randn(12, D)
    opt = moeopt.optimize(chain, (x,), verify="fast")
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["rewritten", "declined"]
    torch.testing.assert_close(opt(x), chain(x), rtol=1e-4, atol=1e-5)
