"""A plain top-k mixture with one unusual turn: pruned experts, masks by language, scripted activations."""

import torch
from torch import nn

from tests.zoo.case import case, flat, made_by, seq
from tests.zoo.mixtures import H, TopK, net


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


@case(
    made_by(lambda s, g: ((torch.randn(*s, H, generator=g), torch.randint(3, s[:1], generator=g)), {})),
    experts=6,
    expect="either",  # one language id per sequence: only the batch size is free, other lengths run the original
)
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


@case(
    made_by(lambda s, g: ((torch.randn(*s, H, generator=g), torch.randn(s[0], 6, generator=g)), {})),
    experts=4,
    expect="either",  # one context row per sequence: only the batch size is free, other lengths run the original
)
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
