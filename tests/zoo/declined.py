"""Mixtures that are not this op, or not safe to rewrite: an honest compiler says which and why."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq


def ffn(d=16, f=24, act=nn.ReLU):
    return nn.Sequential(nn.Linear(d, f), act(), nn.Linear(f, d))


class SoftMoE(nn.Module):
    """Slots are softmax mixtures of all tokens (Puigcerver et al.)."""

    def __init__(self, d=16, n=4, slots=2):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(d, n, slots))
        self.experts = nn.ModuleList([ffn(d) for _ in range(n)])

    def forward(self, x):
        logits = torch.einsum("bmd,dnp->bmnp", x, self.phi)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(-1).view_as(logits)
        xs = torch.einsum("bmd,bmnp->bnpd", x, dispatch)
        ys = torch.stack([f(xs[:, i]) for i, f in enumerate(self.experts)], 1)
        return torch.einsum("bnpd,bmnp->bmd", ys, combine)


@case(seq(16), experts=4, expect="declined", reason="(?i)soft|slot|mix")
def declined_soft_moe():
    return SoftMoE()


class ExpertChoice(nn.Module):
    """Each expert picks its best tokens (Zhou et al.)."""

    def __init__(self, d=16, n=4):
        super().__init__()
        self.gate = nn.Linear(d, n, bias=False)
        self.experts = nn.ModuleList([ffn(d) for _ in range(n)])

    def forward(self, x):
        b, t, d = x.shape
        flat_x = x.reshape(-1, d)
        scores = self.gate(flat_x).softmax(-1)
        g, chosen = scores.t().topk(max(1, b * t // 2), dim=-1)
        y = torch.zeros_like(flat_x)
        for i, f in enumerate(self.experts):
            y.index_add_(0, chosen[i], g[i].unsqueeze(-1) * f(flat_x[chosen[i]]))
        return y.view_as(x)


@case(seq(16), experts=4, expect="declined", reason="(?i)expert.choice|experts (choose|pick)|chosen by experts")
def declined_expert_choice():
    return ExpertChoice()


class Top2(nn.Module):
    def __init__(self, experts, d=16):
        super().__init__()
        self.gate = nn.Linear(d, len(experts))
        self.experts = nn.ModuleList(experts)

    def scores(self, h):
        return self.gate(h)

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.scores(h).softmax(-1).topk(2)
        y = torch.zeros_like(h)
        for i, f in enumerate(self.experts):
            t, k = torch.where(ids == i)
            y.index_add_(0, t, f(h[t]) * w[t, k].unsqueeze(-1))
        return y.view_as(x)


class NoisyInEval(Top2):
    """makeMoE's noisy top-k, which never looks at self.training."""

    def scores(self, h):
        return self.gate(h) + torch.randn(h.shape[0], len(self.experts))


class Gumbel(Top2):
    def scores(self, h):
        return F.gumbel_softmax(self.gate(h), tau=1.0, dim=-1)


class RandomSecond(Top2):
    """The second expert is kept with a probability that grows with its gate."""

    def scores(self, h):
        p = self.gate(h).softmax(-1)
        return p.masked_fill(p < torch.rand_like(p) * 0.4, -1e4)


@case(seq(16), experts=4, expect="declined", reason="(?i)random|determin|noise|rand")
def declined_noise_in_eval():
    return NoisyInEval([ffn() for _ in range(4)])


@case(seq(16), experts=4, expect="declined", reason="(?i)random|determin|noise|rand|exponential")
def declined_gumbel():
    return Gumbel([ffn() for _ in range(4)])


@case(seq(16), experts=4, expect="declined", reason="(?i)random|determin|noise|rand")
def declined_random_second_expert():
    return RandomSecond([ffn() for _ in range(4)])


@case(seq(16), experts=4, expect="declined", reason=r"model\.eval\(\)", training=True)
def declined_training_mode_dropout():
    return Top2([nn.Sequential(ffn(), nn.Dropout(0.2)) for _ in range(4)])


@case(seq(16), experts=4, expect="rewritten", training=True)
def training_mode_without_consequences():
    """A fresh module is in training mode; nothing here depends on it."""
    return Top2([ffn() for _ in range(4)])


@case(seq(16), experts=4)
def odd_different_inner_sizes():
    return Top2([ffn(f=8 * (i + 1)) for i in range(4)])


@case(seq(16), experts=4, expect="declined", reason="(?i)activation|differ|relu|gelu")
def declined_different_activations():
    return Top2([ffn(act=a) for a in (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh)])


@case(seq(16), experts=4, expect="either", reason="(?i)bias|differ|shape")
def odd_one_expert_without_bias():
    experts = [ffn() for _ in range(4)]
    experts[2][2] = nn.Linear(24, 16, bias=False)
    return Top2(experts)


@case(seq(16), experts=4, expect="declined", reason="(?i)meta")
def declined_meta_parameters():
    return Top2([ffn() for _ in range(4)]).to("meta")


class AttentionExpert(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.o((q @ k.transpose(-1, -2) / 4.0).softmax(-1) @ v)


class SequenceMixture(nn.Module):
    """All experts read the sequence; a per-token softmax mixes them."""

    def __init__(self, experts, d=16):
        super().__init__()
        self.router, self.experts = nn.Linear(d, len(experts)), nn.ModuleList(experts)

    def forward(self, x):
        w = self.router(x).softmax(-1)
        return sum(w[..., i, None] * f(x) for i, f in enumerate(self.experts))


@case(seq(16), experts=3, expect="declined", moe=None, reason="(?i)attention|token|mix|softmax|row")
def declined_attention_experts():
    return SequenceMixture([AttentionExpert() for _ in range(3)])


class LSTMExpert(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.rnn = nn.LSTM(d, d, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


@case(seq(16), experts=3, expect="declined", moe=None, reason="(?i)lstm|recurren|token|mix|row")
def declined_recurrent_experts():
    return SequenceMixture([LSTMExpert() for _ in range(3)])


class Conv3Expert(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.a, self.b = nn.Conv1d(d, 24, 3, padding=1), nn.Conv1d(24, d, 1)

    def forward(self, x):
        return self.b(F.relu(self.a(x.transpose(1, 2)))).transpose(1, 2)


@case(seq(16), experts=3, expect="declined", moe=None, reason="(?i)conv|token|mix|row|neighbour")
def declined_conv3_experts():
    return SequenceMixture([Conv3Expert() for _ in range(3)])


class CallCounter(Top2):
    """A Python counter that turns the router's scale up with every call."""

    calls = 0

    def scores(self, h):
        self.calls += 1
        return self.gate(h) * (1.0 + 0.25 * self.calls)


@case(flat(16), experts=4, expect="declined", reason="(?i)state|call|differ|attribute|determin|twice")
def declined_python_counter():
    return CallCounter([ffn() for _ in range(4)])


class DataDependentScale(Top2):
    """An ``.item()`` of the input goes through Python and comes back as a constant."""

    def scores(self, h):
        return self.gate(h) * (2.0 if h.abs().mean().item() > 0.8 else 0.5)


@case(flat(16), experts=4, expect="either", moe=None, reason="(?i)item|python|data|value|tape|constant")
def declined_python_branch_in_router():
    return DataDependentScale([ffn() for _ in range(4)])


class SequenceBySequence(Top2):
    """A Python loop over the batch: each expert runs once for each sequence."""

    def forward(self, x):
        return torch.stack([super(SequenceBySequence, self).forward(row[None])[0] for row in x])


@case(seq(16), experts=4, expect="declined", reason="^its experts run several times .* route all tokens at once")
def declined_loop_over_the_batch():
    return SequenceBySequence([ffn() for _ in range(4)])


class Rounds(Top2):
    """The same mixture three times, one round behind the other, with a share of each in the result (ACT)."""

    def __init__(self, experts):
        super().__init__(experts)
        self.halt = nn.Linear(16, 1)

    def forward(self, x):
        rest, total = torch.ones_like(x[..., :1]), torch.zeros_like(x)
        for _ in range(3):
            x = x + super().forward(x)
            share = self.halt(x).sigmoid()
            total, rest = total + rest * share * x, rest * (1 - share)
        return total + rest * x


@case(seq(16), experts=4, expect="declined", reason="^its experts run several times .* give each round a module of its")
def declined_several_rounds():
    return Rounds([ffn() for _ in range(4)])
