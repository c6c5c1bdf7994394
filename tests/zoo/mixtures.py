"""Other mixtures people build: hierarchical, multi-head, LoRA, conditional convolution, depth, Sinkhorn."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, image, seq

H = 16


def net(i=H, f=24, o=H):
    return nn.Sequential(nn.Linear(i, f), nn.ReLU(), nn.Linear(f, o))


class TopK(nn.Module):
    def __init__(self, experts, d=H, k=2):
        super().__init__()
        self.k, self.gate, self.experts = k, nn.Linear(d, len(experts)), nn.ModuleList(experts)

    def logits(self, h):
        return self.gate(h)

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.logits(h).softmax(-1).topk(self.k)
        y = torch.zeros_like(h)
        for i, f in enumerate(self.experts):
            t, s = (ids == i).nonzero(as_tuple=True)
            if t.shape[0] == 0:
                continue
            y.index_add_(0, t, w[t, s].unsqueeze(1) * f(h[t]))
        return y.view_as(x)


class Hierarchical(nn.Module):
    """Jordan and Jacobs 1994: a softmax of softmax mixtures."""

    def __init__(self, groups=2, per_group=3):
        super().__init__()
        self.top = nn.Linear(H, groups)
        self.gates = nn.ModuleList([nn.Linear(H, per_group) for _ in range(groups)])
        self.experts = nn.ModuleList([nn.ModuleList([net() for _ in range(per_group)]) for _ in range(groups)])

    def forward(self, x):
        outer, y = self.top(x).softmax(-1), 0
        for g, (gate, bank) in enumerate(zip(self.gates, self.experts, strict=True)):
            inner = gate(x).softmax(-1)
            y = y + outer[..., g, None] * sum(inner[..., i, None] * f(x) for i, f in enumerate(bank))
        return y


@case(seq(H), experts=2, expect="either", moe=None)  # two groups, each a function of a row that mixes three networks
def mixture_hierarchical():
    return Hierarchical()


@case(seq(H), experts=3, expect="either", moe=None)  # the inner mixtures are rewritten, each of 3 experts
def mixture_of_mixtures():
    return TopK([TopK([net() for _ in range(3)]) for _ in range(2)], k=1)


class MultiHead(TopK):
    """MH-MoE: each token is split into sub-tokens, routed apart, and merged."""

    def __init__(self, heads=2):
        super().__init__([net(H // 2, 20, H // 2) for _ in range(5)], d=H // 2)
        self.heads, self.split, self.merge = heads, nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x):
        sub = self.split(x).reshape(*x.shape[:-1], self.heads, H // self.heads)
        return self.merge(super().forward(sub).reshape(x.shape))


@case(seq(H), experts=5)
def mixture_multi_head():
    return MultiHead()


class LoRAMixture(nn.Module):
    """One frozen linear for everyone; low-rank experts on top."""

    def __init__(self, n=4, r=4):
        super().__init__()
        self.base, self.route = nn.Linear(H, H), nn.Linear(H, n, bias=False)
        self.lora_a = nn.ModuleList([nn.Linear(H, r, bias=False) for _ in range(n)])
        self.lora_b = nn.ModuleList([nn.Linear(r, H, bias=False) for _ in range(n)])

    def forward(self, x):
        w = self.route(x).softmax(-1)
        delta = sum(w[..., i, None] * b(a(x)) for i, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)))
        return self.base(x) + 2.0 * delta


@case(seq(H), experts=4, expect="either", moe=None)
def mixture_lora():
    return LoRAMixture()


class CondConv(nn.Module):
    """Kernels are mixed, not outputs: one convolution with a per-image kernel."""

    def __init__(self, c=6, n=3):
        super().__init__()
        self.route, self.kernels = nn.Linear(c, n), nn.Parameter(torch.randn(n, c, c, 3, 3) * 0.2)

    def forward(self, x):
        r = torch.sigmoid(self.route(x.mean((2, 3))))
        b, c, h, w = x.shape
        k = torch.einsum("bn,nocij->bocij", r, self.kernels).reshape(b * c, c, 3, 3)
        return F.conv2d(x.reshape(1, b * c, h, w), k, padding=1, groups=b).view(b, c, h, w)


@case(image(6), experts=3, expect="either", moe=None)
def mixture_cond_conv():
    return CondConv()


class Smear(nn.Module):
    """Soft merging: the experts' weights are averaged per sequence, then one MLP runs."""

    def __init__(self, n=4, f=24):
        super().__init__()
        self.route = nn.Linear(H, n)
        self.w1, self.w2 = nn.Parameter(torch.randn(n, H, f) * 0.3), nn.Parameter(torch.randn(n, f, H) * 0.3)

    def forward(self, x):
        p = self.route(x.mean(1)).softmax(-1)
        w1, w2 = torch.einsum("bn,nhf->bhf", p, self.w1), torch.einsum("bn,nfh->bfh", p, self.w2)
        return torch.relu(x @ w1) @ w2


@case(seq(H), experts=4, expect="either", moe=None)
def mixture_merged_weights():
    return Smear()


class Animation(nn.Module):
    """One matrix for each row, blended of the experts' own; biases as they were made (mode-adaptive networks)."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(H, 12), nn.ELU(), nn.Linear(12, 4))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(4, *s) * 0.3) for s in ((H, 24), (24, H)))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(4, size)) for size in (24, H))

    def forward(self, x):
        share, rows = self.gate(x).softmax(-1), x.unsqueeze(1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            own = (share @ weight.flatten(1)).view(len(x), *weight.shape[1:])
            rows = F.elu(torch.baddbmm((share @ bias).unsqueeze(1), rows, own))
        return rows.squeeze(1)


@case(flat(H), experts=4, expect="declined", reason="^it adds up its experts' matrices .weights.0. for each")
def mixture_merged_weights_and_zero_biases():
    return Animation()


class MixtureOfDepths(nn.Module):
    """Half of the tokens of a sequence go through the MLP, the others skip it."""

    def __init__(self):
        super().__init__()
        self.score, self.mlp = nn.Linear(H, 1), net()

    def forward(self, x):
        k = max(1, x.shape[1] // 2)
        s, pos = self.score(x).squeeze(-1).topk(k, dim=1)
        at = pos.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.scatter_add(1, at, self.mlp(x.gather(1, at)) * torch.sigmoid(s).unsqueeze(-1))


@case(seq(H), experts=1, expect="either", moe=None)
def mixture_of_depths():
    return MixtureOfDepths()


class Sinkhorn(TopK):
    """Megatron's balanced choice: a fixed number of row and column normalisations over the batch."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        logits = self.gate(h)
        cost = logits.exp()
        rows, cols = torch.ones(cost.size(0)), torch.ones(cost.size(1))
        for _ in range(6):
            rows = (1 / cost.size(0)) / (torch.sum(cols * cost, 1) + 1e-8)
            cols = (1 / cost.size(1)) / (torch.sum(rows.unsqueeze(1) * cost, 0) + 1e-8)
        pick = torch.argmax(cols * cost * rows.unsqueeze(1), dim=1)
        w = torch.sigmoid(logits).gather(1, pick.unsqueeze(1))
        y = torch.empty_like(h)
        for i, f in enumerate(self.experts):
            mine = torch.where(pick == i)[0]
            y[mine] = f(h[mine])
        return (y * w).view_as(x)


@case(seq(H), experts=4)
def mixture_sinkhorn():
    return Sinkhorn([net() for _ in range(4)])


class SinkhornUntilDone(Sinkhorn):
    """The same with a data-dependent number of rounds."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        p = self.gate(h).exp()
        while (p.sum(0) - p.sum(0).mean()).abs().max() > 0.05:
            p = p / p.sum(0, keepdim=True)
            p = p / p.sum(1, keepdim=True)
        w, ids = p.topk(1)
        y = torch.zeros_like(h)
        for i, f in enumerate(self.experts):
            t = (ids[:, 0] == i).nonzero().flatten()
            y = y.index_add(0, t, f(h[t]) * w[t])
        return y.view_as(x)


def many_tokens(i):
    shape = [(4, 12), (2, 20), (5, 9), (8, 8)][i % 4]
    return (torch.randn(*shape, H, generator=torch.Generator().manual_seed(i)),), {}


@case(many_tokens, experts=4, expect="either")
def mixture_sinkhorn_until_done():
    return SinkhornUntilDone([net() for _ in range(4)])
