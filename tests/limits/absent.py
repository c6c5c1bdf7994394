"""Lines of docs/limits.md on experts that are not in the report."""

import torch
from torch import nn

import moeopt
from tests.limits import limit
from tests.toy_moe import H, X


def absent(make, x=X):
    torch.manual_seed(0)
    assert not moeopt.explain(make().eval(), x).blocks


class MixedVectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.inner = nn.Linear(H, 4), nn.Linear(H, H)
        self.scales = nn.Parameter(torch.randn(4, H))

    def forward(self, x):
        return self.inner(x) * (self.gate(x).softmax(-1) @ self.scales)


@limit("Vectors that a gate mixes")
def mixed_vectors(_):
    absent(MixedVectors)
