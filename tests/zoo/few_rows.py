"""Blocks of which few rows show too little: a mask that keeps all of them, or as many places as there are."""

import torch
from torch import nn

from tests.zoo.case import case, image, seq

H = 16


class Skipping(nn.Module):
    """Tokens that no expert is sure of skip the layer; most calls of few tokens have none of them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 24), nn.GELU(), nn.Linear(24, H)) for _ in range(4))

    def forward(self, x):
        rows = x.reshape(-1, H)
        weights, ids = self.gate(rows).softmax(-1).topk(1)
        sure = weights[:, 0] > 0.3
        kept, total = rows[sure], torch.zeros_like(rows[sure])
        for number, expert in enumerate(self.experts):
            row = torch.where(ids[sure][:, 0] == number)[0]
            total.index_add_(0, row, expert(kept[row]) * weights[sure][row])
        out = rows.clone()
        out[sure] = out[sure] + total
        return out.view_as(x)


@case(seq(H), experts=4)
def unsure_tokens_skip_the_layer():
    return Skipping()


class WholeImages(nn.Module):
    """Each image goes to two networks of 1x1 convolutions by its mean; images lie sorted by network between."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(H, 4) / 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Conv2d(H, 8, 1), nn.GELU(), nn.Conv2d(8, H, 1)) for _ in range(4))

    def forward(self, x):
        scores = x.mean((2, 3)) @ self.gate
        best, ids = scores.topk(2, 1)
        gates = torch.zeros_like(scores).scatter(1, ids, best.softmax(1))
        images, numbers = torch.nonzero(gates).unbind(1)
        order = numbers.argsort(stable=True)
        images, numbers = images[order], numbers[order]
        parts = x[images].split((gates > 0).sum(0).tolist())
        results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, images, results * gates[images, numbers][:, None, None, None])


@case(image(H), experts=4)
def whole_images_sorted_by_expert():
    return WholeImages()
