"""Lines of docs/limits.md on experts that are not in the report."""

import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from tests.limits import limit
from tests.toy_moe import H, X


def absent(make, x=X):
    torch.manual_seed(0)
    assert not moeopt.explain(make().eval(), x).blocks


class MixedProjections(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.kv, self.out = nn.Linear(H, 4), nn.Linear(H, 2 * H), nn.Linear(H, H)
        self.queries = nn.ModuleList(nn.Linear(H, H) for _ in range(4))

    def forward(self, x):
        w = self.gate(x).softmax(-1)
        q = sum(w[..., i, None] * query(x) for i, query in enumerate(self.queries))
        k, v = self.kv(x).chunk(2, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


@limit("Single matrices that every token mixes")
def mixed_projections(_):
    absent(MixedProjections)
