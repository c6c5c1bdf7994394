"""A sparse or nested tensor in a model ends the reading of the block that makes it, and of no other."""

import pytest
import torch
from torch import nn

import moeopt
from tests.zoo.dispatches import D, MaskedSelect, NestedRows, SparseCombine


class SparseBefore(nn.Module):
    """A layer that multiplies by a sparse matrix, before an ordinary mixture."""

    def __init__(self):
        super().__init__()
        self.moe = MaskedSelect()

    def forward(self, x):
        return self.moe(torch.sparse.mm(torch.eye(len(x)).to_sparse(), x))


class NestedBefore(SparseBefore):
    def forward(self, x):
        rows = torch.nested.nested_tensor([x[:5], x[5:]]).unbind()
        return self.moe(torch.cat(rows))


@pytest.mark.parametrize("kinds", [(SparseBefore, SparseCombine), (NestedBefore, NestedRows)])
def test_only_its_own_block_is_declined(kinds):
    torch.manual_seed(0)
    chain = nn.Sequential(*(kind() for kind in kinds)).eval()
    x = torch.randn(12, D)
    opt = moeopt.optimize(chain, (x,), verify="fast")
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["rewritten", "declined"]
    torch.testing.assert_close(opt(x), chain(x), rtol=1e-4, atol=1e-5)
