"""Whole small models: language models, encoder-decoder, and MoE code with no module of its own."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, made_by, seq, token_ids


class Attention(nn.Module):
    def __init__(self, d, heads=2, causal=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x, memory=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        if memory is not None:
            _, k, v = self.qkv(memory).chunk(3, -1)
        q, k, v = (t.view(B, -1, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and memory is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, d, mult=2):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d, mult * d), nn.Linear(mult * d, d)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class MoEFeedForward(nn.Module):
    """ "x @ w_gate", top-k, a loop with a weight column per expert."""

    def __init__(self, d, n=4, k=2):
        super().__init__()
        self.k = k
        self.w_gate = nn.Parameter(torch.randn(d, n) * d**-0.5)
        self.experts = nn.ModuleList([MLP(d) for _ in range(n)])

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        top, ids = (x @ self.w_gate).topk(self.k, dim=-1)
        full = torch.zeros(x.shape[0], len(self.experts)).scatter(1, ids, top.softmax(-1))
        out = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            rows = full[:, i].nonzero().squeeze(1)
            if rows.numel() > 0:
                out[rows] += e(x[rows]) * full[rows, i].unsqueeze(1)
        return out.view(shape)


class Block(nn.Module):
    def __init__(self, d, ffn):
        super().__init__()
        self.ln_1, self.ln_2, self.attn, self.ffn = nn.LayerNorm(d), nn.LayerNorm(d), Attention(d), ffn

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.ffn(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT with an MoE in every other layer and tied embeddings."""

    def __init__(self, vocab=40, d=24, layers=4):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(32, d)
        self.h = nn.ModuleList([Block(d, MoEFeedForward(d) if i % 2 else MLP(d)) for i in range(layers)])
        self.ln_f = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


@case(token_ids(40), experts=4, moe=2)
def whole_nano_gpt():
    return GPT()


@case(
    made_by(
        lambda s, g: ((), {"idx": torch.randint(40, s, generator=g), "targets": torch.randint(40, s, generator=g)})
    ),
    experts=4,
    moe=2,
)
def whole_nano_gpt_with_loss():
    return GPT()


class Monolith(nn.Module):
    """Attention, residuals and the MoE written straight into one forward."""

    def __init__(self, d=20, f=24, n=4):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.router = nn.Linear(d, n)
        self.w_in = nn.Parameter(torch.randn(n, d, f) * 0.3)
        self.w_out = nn.Parameter(torch.randn(n, f, d) * 0.3)

    def forward(self, x):
        h = self.n1(x)
        att = torch.softmax(self.q(h) @ self.k(h).transpose(-1, -2) / h.shape[-1] ** 0.5, -1)
        x = x + self.o(att @ self.v(h))
        h = self.n2(x).flatten(0, 1)
        w, e = self.router(h).softmax(-1).topk(2, -1)
        y = torch.zeros_like(h)
        for i in range(self.router.out_features):
            t, s = torch.where(e == i)
            y = y.index_add(0, t, (torch.relu(h[t] @ self.w_in[i]) @ self.w_out[i]) * w[t, s].unsqueeze(-1))
        return x + y.view_as(x)


@case(seq(20), experts=4)
def whole_monolith():
    return Monolith()


class TwoInOneForward(nn.Module):
    """Two MoE layers, one after the other, with no submodule for either."""

    def __init__(self, d=16, f=20):
        super().__init__()
        self.r1, self.r2 = nn.Linear(d, 3), nn.Linear(d, 5)
        self.first = nn.ModuleList([nn.Linear(d, f) for _ in range(3)])
        self.first_out = nn.ModuleList([nn.Linear(f, d) for _ in range(3)])
        self.second = nn.ModuleList([nn.Sequential(nn.Linear(d, f), nn.SiLU(), nn.Linear(f, d)) for _ in range(5)])

    def forward(self, x):
        flat = x.flatten(0, -2)
        w, c = self.r1(flat).softmax(-1).max(-1)
        y = torch.zeros_like(flat)
        for i in range(3):
            m = c == i
            y[m] = self.first_out[i](F.gelu(self.first[i](flat[m]))) * w[m, None]
        flat = flat + y
        w, c = self.r2(flat).softmax(-1).topk(2)
        z = torch.zeros_like(flat)
        for i in range(5):
            t, s = torch.where(c == i)
            z.index_add_(0, t, self.second[i](flat[t]) * w[t, s, None])
        return (flat + z).view_as(x)


@case(seq(16), experts=(3, 5), moe=2)
def whole_two_in_one_forward():
    return TwoInOneForward()


class EncoderDecoder(nn.Module):
    def __init__(self, vocab=30, d=16):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.enc = Block(d, MoEFeedForward(d, n=3))
        self.enc.attn.causal = False
        self.dec, self.cross = Block(d, MoEFeedForward(d, n=3)), Attention(d)
        self.out = nn.Linear(d, vocab)

    def forward(self, input_ids, decoder_input_ids):
        memory = self.enc(self.emb(input_ids))
        y = self.emb(decoder_input_ids)
        y = y + self.cross(y, memory)
        return {"logits": self.out(self.dec(y)), "encoder_last_hidden_state": memory}


def _pair(s, g):
    return (), {
        "input_ids": torch.randint(30, s, generator=g),
        "decoder_input_ids": torch.randint(30, (s[0], s[1] + 2), generator=g),
    }


@case(made_by(_pair), experts=3, moe=2)
def whole_encoder_decoder():
    return EncoderDecoder()


class MoLETraining(nn.Module):
    """Mixture of lookup experts while training: all experts read the token *embedding*, the router reads h."""

    def __init__(self, vocab=30, d=16, n=4):
        super().__init__()
        self.emb, self.attn, self.norm = nn.Embedding(vocab, d), Attention(d), nn.LayerNorm(d)
        self.router = nn.Linear(d, n, bias=False)
        self.experts = nn.ModuleList([MLP(d) for _ in range(n)])
        self.shared = MLP(d)

    def forward(self, ids):
        e = self.emb(ids)
        h = e + self.attn(e)
        n = self.norm(h)
        w = self.router(n).softmax(-1)
        routed = torch.stack([f(e) for f in self.experts], 2)
        return h + self.shared(n) + (w.unsqueeze(2) @ routed).squeeze(2)


@case(token_ids(30), experts=4)
def whole_mole_training_form():
    return MoLETraining()


class MultiGate(nn.Module):
    """MMoE for recommendation: one bank of experts, a softmax gate and a tower per task."""

    def __init__(self, features=18, f=20, d=12, n=4, tasks=2):
        super().__init__()
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(features, f), nn.ReLU(), nn.Linear(f, d)) for _ in range(n)]
        )
        self.gates = nn.ModuleList([nn.Linear(features, n) for _ in range(tasks)])
        self.towers = nn.ModuleList([nn.Linear(d, 1) for _ in range(tasks)])

    def forward(self, x):
        outs = torch.stack([e(x) for e in self.experts], 1)
        mixed = [(g(x).softmax(-1).unsqueeze(-1) * outs).sum(1) for g in self.gates]
        return tuple(torch.sigmoid(t(m)) for t, m in zip(self.towers, mixed))


@case(made_by(lambda s, g: ((torch.randn(s[0] * s[1], 18, generator=g),), {})), experts=4, expect="either", moe=None)
def whole_mmoe_two_tasks():
    return MultiGate()
