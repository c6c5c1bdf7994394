"""Forwards that take another path another time: by length, by flag, by a plain argument."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, made_by, seq


class SwiGLU(nn.Module):
    def __init__(self, d=20, f=24):
        super().__init__()
        self.wi, self.wo = nn.Linear(d, 2 * f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x):
        a, b = self.wi(x).chunk(2, -1)
        return self.wo(F.silu(a) * b)


class Moe(nn.Module):
    def __init__(self, d=20, n=4, k=2):
        super().__init__()
        self.n, self.k = n, k
        self.gate = nn.Linear(d, n, bias=False)
        self.experts = nn.ModuleList([SwiGLU(d) for _ in range(n)])

    def route(self, x):
        w, ids = self.gate(x).softmax(-1).topk(self.k)
        return w / w.sum(-1, keepdim=True), ids

    def loop(self, x, w, ids):
        y = torch.zeros_like(x)
        for e in range(self.n):
            t, s = torch.where(ids == e)
            if t.numel():
                y.index_add_(0, t, self.experts[e](x[t]) * w[t, s, None])
        return y

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        return self.loop(h, *self.route(h)).view_as(x)


class PrefillOrDecode(Moe):
    """One position at a time takes the gathered path; longer inputs take the loop."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.route(h)
        if x.shape[1] > 1:
            return self.loop(h, w, ids).view_as(x)
        wi = torch.stack([e.wi.weight for e in self.experts])[ids]
        wo = torch.stack([e.wo.weight for e in self.experts])[ids]
        a, b = torch.einsum("tkoh,th->tko", wi, h).chunk(2, -1)
        return torch.einsum("tkho,tko,tk->th", wo, F.silu(a) * b, w).view_as(x)


@case(seq(20), experts=4, expect="either")
def branch_prefill_or_decode():
    return PrefillOrDecode()


class SmallBatchScale(Moe):
    """A different function for short inputs: whoever generalises from one length is wrong."""

    def forward(self, x):
        y = super().forward(x)
        return y * 0.5 if x.shape[0] * x.shape[1] < 5 else y


@case(seq(20), experts=4, expect="either")
def branch_short_inputs_are_scaled():
    return SmallBatchScale()


class OptionalMask(Moe):
    """The example has no mask; later calls do."""

    def forward(self, x, mask=None, output_router_logits=False):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.route(h)
        if mask is not None:
            w = w * mask.reshape(-1, 1)
        y = self.loop(h, w, ids).view_as(x)
        return (y, self.gate(h)) if output_router_logits else y


def later_with_mask(i):
    shape = [(2, 6), (2, 6), (1, 3), (2, 6), (3, 5)][i % 5]
    g = torch.Generator().manual_seed(i)
    x, mask = torch.randn(*shape, 20, generator=g), (torch.rand(shape, generator=g) > 0.4).float()
    return (x,), [{}, {"mask": mask}, {}, {"output_router_logits": True}, {"mask": mask}][i % 5]


@case(later_with_mask, experts=4, expect="either")
def branch_mask_and_flag_appear_later():
    return OptionalMask()


class ScalarArgument(Moe):
    """A plain float argument that differs from call to call."""

    def forward(self, x, temperature=1.0):
        h = x.reshape(-1, x.shape[-1])
        w, ids = (self.gate(h) / temperature).softmax(-1).topk(self.k)
        return self.loop(h, w, ids).view_as(x)


@case(
    made_by(
        lambda s, g: ((torch.randn(*s, 20, generator=g),), {"temperature": 0.5 + torch.rand((), generator=g).item()})
    ),
    experts=4,
    expect="either",
)
def branch_float_argument():
    return ScalarArgument()


class KeptExperts(Moe):
    """The caller says how many experts to use, a plain integer."""

    def forward(self, x, top_k=2):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.gate(h).softmax(-1).topk(top_k)
        return self.loop(h, w, ids).view_as(x)


@case(made_by(lambda s, g: ((torch.randn(*s, 20, generator=g),), {"top_k": 1 + s[0] % 3})), experts=4, expect="either")
def branch_top_k_argument():
    return KeptExperts()
