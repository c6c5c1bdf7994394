"""Lines of docs/limits.md on experts that are not in the report."""

import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from tests.limits import limit
from tests.toy_moe import Block, H, X, seeded
from tests.zoo import CASES


def absent(make, x=X):
    torch.manual_seed(0)
    assert not moeopt.explain(make().eval(), x).blocks


class Unregistered(Block):
    def __init__(self):
        super().__init__()
        experts = list(self.experts)
        del self.experts
        self.__dict__["experts"] = experts


class PlainTensors(Block):
    def __init__(self):
        super().__init__()
        del self.experts
        self.w1, self.w2 = [seeded(H, H) for _ in range(4)], [seeded(H, H, seed=6) for _ in range(4)]
        self.experts = [lambda x, e=e: (x @ self.w1[e]).relu() @ self.w2[e] for e in range(4)]


@limit("Experts in plain Python lists")
def unregistered(_):
    absent(Unregistered)
    absent(PlainTensors)


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


@limit("Recurrent experts, convolutions that every token mixes, one grouped convolution as all experts")
def other_layers(_):
    for name in ("declined_recurrent_experts", "declined_conv3_experts", "dense_grouped_conv"):
        case = CASES[name]
        absent(case.build, case.inputs()[0])
