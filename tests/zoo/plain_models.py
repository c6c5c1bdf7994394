"""Models with no mixture in them at all."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, seq, token_ids
from tests.zoo.declined import AttentionExpert, ffn


class DenseMLP(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, 40), nn.Linear(d, 40), nn.Linear(40, d)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@case(seq(16), experts=0, expect="either", moe=0)
def plain_dense_mlp():
    return nn.Sequential(nn.LayerNorm(16), DenseMLP(), ffn())


@case(seq(16), experts=0, expect="either", moe=0)
def plain_attention_only():
    return nn.Sequential(AttentionExpert(), nn.LayerNorm(16), AttentionExpert())


@case(seq(16), experts=3, expect="either", moe=None)
def plain_parallel_heads():
    """Same-shaped children added up, with no router: an ensemble, not a mixture."""

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = nn.ModuleList([ffn() for _ in range(3)])

        def forward(self, x):
            return torch.stack([m(x) for m in self.members]).mean(0)

    return Ensemble()


@case(token_ids(20), experts=0, expect="either", moe=0)
def plain_embedding_classifier():
    return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
