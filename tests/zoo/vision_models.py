"""Vision: a transformer with an MoE block, convolutions as experts."""

import torch
from torch import nn

from tests.zoo.case import case, image
from tests.zoo.whole_models import MLP, Block, MoEFeedForward


class ViT(nn.Module):
    """V-MoE: patches, class token, an MoE in the last block, GELU experts with biases."""

    def __init__(self, d=24, patch=2):
        super().__init__()
        self.patch = nn.Conv2d(3, d, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, d))
        self.blocks = nn.ModuleList([Block(d, MLP(d)), Block(d, MoEFeedForward(d, n=6))])
        self.head = nn.Linear(d, 10)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        for b in self.blocks:
            x = b(x)
        return self.head(x[:, 0])


def pixels(i):
    shape = [(2, 3, 4, 4), (1, 3, 2, 2), (3, 3, 6, 4), (1, 3, 8, 8)][i % 4]
    return (torch.randn(shape, generator=torch.Generator().manual_seed(i)),), {}


@case(pixels, experts=6)
def whole_vision_transformer():
    return ViT()


class ConvExperts(nn.Module):
    """1x1 convolutions as experts on NCHW; a per-pixel gate map weights them."""

    def __init__(self, c=12, f=16, n=4, k=None):
        super().__init__()
        self.k = k
        self.gate = nn.Conv2d(c, n, 1)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(c, f, 1), nn.ReLU(), nn.Conv2d(f, c, 1)) for _ in range(n)]
        )

    def forward(self, x):
        g = self.gate(x).softmax(1)
        if self.k:
            top, idx = g.topk(self.k, dim=1)
            g = torch.zeros_like(g).scatter(1, idx, top)
        return x + sum(g[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))


@case(image(12), experts=4)
def whole_conv_experts_top2():
    return ConvExperts(k=2)


@case(image(12), experts=3)
def whole_conv_experts_dense():
    return ConvExperts(n=3)


class ImageRoutedConvs(nn.Module):
    """3x3 convolutions as experts, one for each image: a call of few images leaves most of them idle."""

    def __init__(self, c=8, n=3):
        super().__init__()
        self.gate = nn.Linear(c, n)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 1)) for _ in range(n)
        )

    def forward(self, x):
        w, best = self.gate(x.mean((2, 3))).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = best == e
            if mine.any():
                y[mine] = expert(x[mine]) * w[mine, None, None, None]
        return y


class NormedConvs(nn.Module):
    """1x1 convolutions with batch norms, two for each image; experts that no image chose are passed over."""

    def __init__(self, c=8, n=4):
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, n, 1))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, c, 1))
            for _ in range(n)
        )
        for expert in self.experts:
            expert[1].running_mean.normal_()
            expert[1].running_var.uniform_(0.5, 2)

    def forward(self, x):
        weights, ids = self.gate(x.mean((2, 3), keepdim=True)).flatten(1).softmax(1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            image, slot = torch.where(ids == number)
            if image.numel() == 0:
                continue
            y.index_add_(0, image, expert(x[image]) * weights[image, slot].view(-1, 1, 1, 1))
        return x + y


@case(image(8), experts=4, expect="either")
def whole_image_routed_convolutions_with_norms():
    return NormedConvs()


@case(
    lambda i: (((torch.ones(1, 8, 5, 4) * (i + 1)),), {}), experts=3, expect="declined",
    reason="(?i)convolution|conv2d|3 ?x ?3|3, 3",
)  # fmt: skip
def whole_image_routed_convolutions():
    return ImageRoutedConvs()
