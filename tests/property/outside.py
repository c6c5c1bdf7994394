"""Programs that no ``experts`` op computes, and look as if it did: each must be left alone, with a reason.

Shape legend: T tokens, E experts, K chosen per token, H hidden, N rows of one expert, S slots of Soft MoE.
"""

import torch
from torch import nn

from tests.property import experts
from tests.property.spec import Program


class TopK(nn.Module):
    """The honest mixture that the others spoil in one place."""

    def __init__(self, p: Program):
        super().__init__()
        self.p = p
        self.gate = nn.Linear(p.hidden, p.experts, bias=False)
        self.experts = nn.ModuleList([self.expert(p, e) for e in range(p.experts)])

    def expert(self, p: Program, e: int) -> nn.Module:
        return experts.FFN(p)

    def logits(self, x):
        return self.gate(x)

    def weights(self, x):
        weights, ids = self.logits(x).softmax(-1).topk(self.p.top_k, dim=-1)
        return ids, weights

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, self.p.hidden)
        ids, weights = self.weights(x)
        return self.mixture(x, ids, weights).reshape(hidden_states.shape)

    def mixture(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            y.index_add_(0, tok, (expert(x[tok]) * weights[tok, slot, None]).to(x.dtype))
        return y


class ExpertChoice(TopK):
    """Each expert takes half of the tokens."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, self.p.hidden)
        weights, chosen = self.gate(x).softmax(-1).t().topk((x.shape[0] + 1) // 2, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y.index_add_(0, chosen[e], expert(x[chosen[e]]) * weights[e].unsqueeze(-1))
        return y.reshape(hidden_states.shape)


class SoftMoE(TopK):
    """Slots are mixtures of all tokens."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, self.p.hidden)
        logits_TE = self.gate(x)
        slots = logits_TE.softmax(0).t() @ x
        done = torch.cat([expert(slots[e : e + 1]) for e, expert in enumerate(self.experts)])
        return (logits_TE.softmax(-1) @ done).reshape(hidden_states.shape)


class Noisy(TopK):
    """Noise on the logits that never asks for self.training."""

    def logits(self, x):
        return self.gate(x) + torch.randn_like(x[:, :1]) * torch.rand(self.p.experts, dtype=x.dtype)


class Dropped(TopK):
    """A random part of the tokens is dropped, in eval too."""

    def weights(self, x):
        ids, weights = super().weights(x)
        return ids, weights * torch.bernoulli(torch.full_like(weights, 0.7))


class RandomRouter(TopK):
    def weights(self, x):
        probs = self.gate(x).softmax(-1)
        ids = torch.multinomial(probs, self.p.top_k)
        return ids, probs.gather(-1, ids)


class OtherActivation(TopK):
    """The last expert has another activation."""

    def expert(self, p, e):
        act = nn.ReLU() if e < p.experts - 1 else nn.Tanh()
        return nn.Sequential(nn.Linear(p.hidden, p.inner), act, nn.Linear(p.inner, p.hidden))


class OtherDepth(TopK):
    """The last expert has a layer more."""

    def expert(self, p, e):
        layers = [nn.Linear(p.hidden, p.inner), nn.ReLU(), nn.Linear(p.inner, p.hidden)]
        return nn.Sequential(*layers, *([nn.ReLU(), nn.Linear(p.hidden, p.hidden)] if e == p.experts - 1 else []))


class OtherScale(TopK):
    """The last expert's output is scaled, by a number no parameter holds."""

    def mixture(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            rows = expert(x[tok]) * (1.5 if e == self.p.experts - 1 else 1.0)
            y.index_add_(0, tok, rows * weights[tok, slot, None])
        return y


class OtherWidth(TopK):
    """Inner sizes differ. An op on a list of experts may take that, so it is left open."""

    def expert(self, p, e):
        inner = p.inner + 4 * e
        return nn.Sequential(nn.Linear(p.hidden, inner), nn.ReLU(), nn.Linear(inner, p.hidden))


class BatchNormed(nn.Module):
    """An expert that normalises over its rows: a token's result depends on who else came."""

    def __init__(self, p: Program):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(p.hidden, p.inner), nn.Linear(p.inner, p.hidden)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(torch.relu(h - h.mean(0, keepdim=True)))


class NormalisedOverRows(TopK):
    def expert(self, p, e):
        return BatchNormed(p)


class Cumulative(nn.Module):
    """An expert that adds up its rows in order."""

    def __init__(self, p: Program):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(p.hidden, p.inner), nn.Linear(p.inner, p.hidden)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x).cumsum(0)))


class MixesRows(TopK):
    def expert(self, p, e):
        return Cumulative(p)


class MaxOfExperts(TopK):
    """The experts' results are not added: the largest value wins."""

    def forward(self, hidden_states):
        return torch.stack([expert(hidden_states) for expert in self.experts]).amax(0)


class ProductOfExperts(TopK):
    def forward(self, hidden_states):
        weights = self.gate(hidden_states).softmax(-1)
        y = torch.ones_like(hidden_states)
        for e, expert in enumerate(self.experts):
            y = y * expert(hidden_states) * weights[..., e, None]
        return y


class Chained(TopK):
    """Each expert reads what the one before it left: a depth, not a mixture."""

    def mixture(self, x, ids, weights):
        for e, expert in enumerate(self.experts):
            tok, slot = torch.where(ids == e)
            x = x.index_add(0, tok, expert(x[tok]) * weights[tok, slot, None])
        return x


class PythonBranch(TopK):
    """The mean of all values decides, in Python, which function is computed."""

    def forward(self, hidden_states):
        y = super().forward(hidden_states)
        return y * 2.0 if float(hidden_states.mean()) > 0 else y


class PythonTopK(TopK):
    """How many experts a token gets depends on the values of the batch."""

    def weights(self, x):
        weights = self.logits(x).softmax(-1)
        k = 1 + int(x.abs().max().item() > 3.5)
        weights, ids = weights.topk(min(k, self.p.experts), dim=-1)
        return ids, weights


class PythonCounter(TopK):
    """The result depends on how often the model was called."""

    def __init__(self, p: Program):
        super().__init__(p)
        self.calls = 0

    def forward(self, hidden_states):
        self.calls += 1
        return super().forward(hidden_states) * (1.0 + 0.5 * (self.calls % 2))


class Remembers(TopK):
    """The router's logits are averaged with those of the last call."""

    def __init__(self, p: Program):
        super().__init__(p)
        self.last = None

    def logits(self, x):
        logits = self.gate(x)
        now = logits.mean(0, keepdim=True).detach()
        logits = logits if self.last is None else logits + self.last
        self.last = now
        return logits


KINDS = {
    "expert choice": ExpertChoice,
    "soft moe": SoftMoE,
    "noise": Noisy,
    "random drop": Dropped,
    "random router": RandomRouter,
    "other activation": OtherActivation,
    "other depth": OtherDepth,
    "other scale": OtherScale,
    "normalised over rows": NormalisedOverRows,
    "mixes rows": MixesRows,
    "max of experts": MaxOfExperts,
    "product of experts": ProductOfExperts,
    "chained": Chained,
    "python branch": PythonBranch,
    "python top-k": PythonTopK,
    "python counter": PythonCounter,
    "remembers": Remembers,
    "other width": OtherWidth,
}
OPEN = ("other width",)
"""Kinds that may be rewritten, and must be right if they are."""
