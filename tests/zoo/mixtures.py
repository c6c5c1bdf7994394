"""Other mixtures people build: hierarchical, multi-head, LoRA, conditional convolution, depth, Sinkhorn, pruned."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, image, made_by, seq

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


@case(seq(H), experts=6, expect="either", moe=None)
def mixture_hierarchical():
    return Hierarchical()


@case(seq(H), experts=2, expect="either", moe=None)
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


class Pruned(TopK):
    """Two experts were pruned: their logits are filled with -inf in place, their modules stay."""

    def logits(self, h):
        scores = self.gate(h)
        scores[:, [1, 4]] = float("-inf")
        return scores


@case(seq(H), experts=6, expect="either", moe=1)
def mixture_pruned_experts():
    return Pruned([net() for _ in range(6)])


class LanguageExperts(TopK):
    """A boolean table says which experts a language may use; the language id is an input."""

    def __init__(self):
        super().__init__([net() for _ in range(6)])
        self.register_buffer(
            "allowed", torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 1, 1]]).bool()
        )

    def forward(self, x, language):
        h = x.reshape(-1, H)
        scores = self.gate(h).masked_fill(~self.allowed[language].repeat_interleave(x.shape[1], 0), -1e9)
        w, ids = scores.softmax(-1).topk(self.k)
        y = torch.zeros_like(h)
        for i, f in enumerate(self.experts):
            t, s = torch.where(ids == i)
            y.index_add_(0, t, f(h[t]) * w[t, s, None])
        return y.view_as(x)


@case(made_by(lambda s, g: ((torch.randn(*s, H, generator=g), torch.randint(3, s[:1], generator=g)), {})), experts=6)
def mixture_language_mask():
    return LanguageExperts()


class FeatureSlices(nn.Module):
    """Each expert reads its own slice of the features, and a gate weights them."""

    def __init__(self, n=4):
        super().__init__()
        self.gate = nn.Linear(H, n)
        self.experts = nn.ModuleList([net(H // n, 12, H) for _ in range(n)])

    def forward(self, x):
        parts, w = x.chunk(len(self.experts), -1), self.gate(x).softmax(-1)
        return sum(w[..., i, None] * f(p) for i, (f, p) in enumerate(zip(self.experts, parts, strict=True)))


@case(seq(H), experts=4, expect="either", moe=None)
def mixture_feature_slices():
    return FeatureSlices()


class WithContext(nn.Module):
    """Experts read [x, context] and give another width."""

    def __init__(self, n=4):
        super().__init__()
        self.gate = nn.Linear(H, n)
        self.experts = nn.ModuleList([net(H + 6, 24, 10) for _ in range(n)])

    def forward(self, x, context):
        both = torch.cat([x, context.unsqueeze(1).expand(-1, x.shape[1], -1)], -1).flatten(0, 1)
        w, ids = self.gate(x).flatten(0, 1).softmax(-1).topk(2)
        y = both.new_zeros(both.shape[0], 10)
        for i, f in enumerate(self.experts):
            t, s = torch.where(ids == i)
            y[t] += f(both[t]) * w[t, s, None]
        return y.view(*x.shape[:2], 10)


@case(made_by(lambda s, g: ((torch.randn(*s, H, generator=g), torch.randn(s[0], 6, generator=g)), {})), experts=4)
def mixture_with_context():
    return WithContext()


@case(flat(H), experts=1, expect="either", moe=None)
def mixture_of_one():
    return TopK([net()], k=1)


class Unweighted(TopK):
    """The K winners are averaged; the router's scores are thrown away."""

    def forward(self, x):
        ids = self.gate(x).topk(self.k).indices
        return torch.stack([self.one_slot(x, ids[:, j]) for j in range(self.k)]).mean(0)

    def one_slot(self, x, ids):
        y = torch.empty_like(x)
        for i, f in enumerate(self.experts):
            y[ids == i] = f(x[ids == i])
        return y


@case(flat(H), experts=4)
def mixture_unweighted_average():
    return Unweighted([net() for _ in range(4)])


class ScaledInputs(TopK):
    """Older torchtitan: routed rows are scaled before the experts, which have biases."""

    def forward(self, x):
        w, ids = self.gate(x).sigmoid().topk(self.k)
        y = torch.zeros_like(x)
        for i, f in enumerate(self.experts):
            t, s = torch.where(ids == i)
            y = y.index_add(0, t, f(x[t] * w[t, s, None]))
        return y


@case(flat(H), experts=4)
def mixture_weight_on_input_with_bias():
    return ScaledInputs([net() for _ in range(4)])


@torch.jit.script
def scripted_glu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * torch.sigmoid(a) * b


class Scripted(nn.Module):
    """The activation is a torch.jit.script function."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(H, 24), nn.Linear(H, 24), nn.Linear(24, H)

    def forward(self, x):
        return self.c(scripted_glu(self.a(x), self.b(x)))


@case(flat(H), experts=4)
def mixture_scripted_activation():
    return TopK([Scripted() for _ in range(4)])


class TransformerLayer(nn.Module):
    """torch.nn's own encoder layer with its feed-forward replaced by a MoE.

    A trap: in eval without gradients the layer takes a fused path that never calls ``_ff_block``, so the
    MoE runs only where gradients are on.
    """

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(H, 2, 32, batch_first=True, norm_first=True)
        self.layer._ff_block = TopK([net() for _ in range(4)])

    def forward(self, x):
        return self.layer(x)


@case(seq(H), experts=4, expect="either", moe=None)
def mixture_in_torch_encoder_layer():
    return TransformerLayer()


class PostNormLayer(nn.Module):
    """The same idea written by hand with nn.MultiheadAttention: post-norm, attention weights returned."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(H, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.moe = TopK([net() for _ in range(4)])

    def forward(self, x):
        a, weights = self.attn(x, x, x)
        x = self.norm1(x + a)
        return self.norm2(x + self.moe(x)), weights


@case(seq(H), experts=4)
def mixture_after_multihead_attention():
    return PostNormLayer()
