"""Ways of writing the same few functions that nobody's library uses and everybody's notebook does."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq

D, M, N, K = 16, 24, 4, 2


def mlp(act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, M), act(), nn.Linear(M, D))


class Mlps(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.GELU):
        super().__init__()
        self.experts = nn.ModuleList(mlp(act) for _ in range(N))
        self.router = nn.Linear(D, N)


class NamedExperts(nn.Module):
    """Experts by name, a token mask per name, read-modify-write of the masked rows."""

    names = ("code", "math", "law", "misc")

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({n: mlp() for n in self.names})
        self.router = nn.Linear(D, N)

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(K, -1)
        masks = {n: ids == j for j, n in enumerate(self.names)}
        out = torch.zeros_like(x)
        for name, expert in self.experts.items():
            mine = masks[name].any(-1)
            if not mine.any():
                continue
            out[mine] = out[mine] + expert(x[mine]) * (w * masks[name]).sum(-1)[mine].unsqueeze(-1)
        return out


@case(flat(D), experts=N)
def hand_named_experts():
    return NamedExperts()


class OneHotSum(Mlps):
    """``sum()`` over a generator, weights through a one-hot of the ids."""

    def forward(self, x):
        w, ids = torch.topk(self.router(x), K)
        table = (F.one_hot(ids, N).to(x.dtype) * w.softmax(-1)[..., None]).sum(-2)
        return sum(expert(x) * table[..., e : e + 1] for e, expert in enumerate(self.experts))


@case(seq(D), experts=N)
def hand_one_hot_sum():
    return OneHotSum(nn.ReLU)


class InfinityGates(Mlps):
    """The k best logits scattered into minus infinity, then a softmax; noise in training only."""

    def forward(self, x):
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits)
        best, ids = logits.topk(K, -1)
        gates = torch.full_like(logits, float("-inf")).scatter_(-1, ids, best).softmax(-1).view(-1, N)
        y = torch.zeros_like(x)
        rows, out = x.view(-1, D), y.view(-1, D)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(-1).view(-1)
            if mine.any():
                out[mine] += expert(rows[mine]) * gates[mine, e].unsqueeze(1)
        return y


@case(seq(D), experts=N)
def hand_infinity_gates():
    return InfinityGates(nn.SiLU)


class StraightThrough(Mlps):
    """One expert forward, the soft gate's gradient backward."""

    def forward(self, x):
        p = self.router(x).softmax(-1)
        hard = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)
        gates = hard - p.detach() + p
        return (torch.stack([expert(x) for expert in self.experts], -2) * gates.unsqueeze(-1)).sum(-2)


@case(seq(D), experts=N)
def hand_straight_through():
    return StraightThrough()


class Adapters(nn.Module):
    """A frozen Linear plus a mixture of low-rank products, each scaled by alpha / rank."""

    def __init__(self, rank=4):
        super().__init__()
        self.base, self.router = nn.Linear(D, D), nn.Linear(D, N)
        self.a, self.b = nn.Parameter(torch.randn(N, rank, D) / 4), nn.Parameter(torch.randn(N, D, rank) / 4)
        self.scale = 12 / rank

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(K, -1)
        delta = torch.zeros_like(x)
        for e in range(N):
            gate = (w * (ids == e)).sum(-1, keepdim=True)
            delta = delta + gate * (x @ self.a[e].T @ self.b[e].T * self.scale)
        return self.base(x) + delta


@case(flat(D), experts=N)
def hand_scaled_adapters():
    return Adapters()


class FlatTheta(nn.Module):
    """All of an expert is one row of a matrix, cut up by ``split``."""

    sizes = (M * D, M, D * M, D)

    def __init__(self):
        super().__init__()
        self.theta, self.router = nn.Parameter(torch.randn(N, sum(self.sizes)) / 4), nn.Linear(D, N)

    def forward(self, x):
        w, ids = self.router(x).topk(K, -1)
        y = torch.zeros_like(x)
        for e in range(N):
            w1, b1, w2, b2 = self.theta[e].split(self.sizes)
            t, s = torch.where(ids == e)
            o = F.linear(F.gelu(F.linear(x[t], w1.view(M, D), b1)), w2.view(D, M), b2)
            y.index_add_(0, t, o * w[t, s].view(-1, 1))
        return y


@case(flat(D), experts=N)
def hand_flat_theta():
    return FlatTheta()


class Banks(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N)
        self.w1, self.b1 = nn.Parameter(torch.randn(N, D, M) / 4), nn.Parameter(torch.randn(N, 1, M) / 4)
        self.w2, self.b2 = nn.Parameter(torch.randn(N, M, D) / 4), nn.Parameter(torch.randn(N, 1, D) / 4)


class Baddbmm(Banks):
    def forward(self, x):
        w, ids = self.router(x).topk(K, -1)
        gates = torch.zeros(len(x), N, dtype=x.dtype).scatter(1, ids, w.softmax(-1))
        h = F.relu(torch.baddbmm(self.b1, x.expand(N, -1, -1), self.w1))
        return torch.einsum("te,eth->th", gates, torch.baddbmm(self.b2, h, self.w2))


@case(flat(D), experts=N)
def hand_baddbmm():
    return Baddbmm()


class StackedState(nn.Module):
    """``stack_module_state``, ``vmap`` and ``functional_call``."""

    def __init__(self):
        super().__init__()
        experts = [mlp(nn.ReLU) for _ in range(N)]
        state, _ = torch.func.stack_module_state(experts)
        self.names = tuple(state)
        self.state = nn.ParameterList([nn.Parameter(t.detach()) for t in state.values()])
        self.__dict__["template"] = copy.deepcopy(experts[0]).to("meta")
        self.router = nn.Linear(D, N)

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(K, -1)
        gates = torch.zeros(*x.shape[:-1], N, dtype=x.dtype).scatter(-1, ids, w)
        call = torch.func.vmap(lambda p, x: torch.func.functional_call(self.template, p, (x,)), (0, None))
        return torch.einsum("e...h,...e->...h", call(dict(zip(self.names, self.state, strict=True)), x), gates)


@case(seq(D), experts=N)
def hand_vmap_of_functional_call():
    return StackedState()


class Template(Banks):
    """One module without weights of its own, called once per expert with that expert's."""

    def __init__(self):
        super().__init__()
        self.__dict__["template"] = mlp()

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(K, -1)
        y = torch.zeros_like(x)
        for e in range(N):
            t, s = torch.where(ids == e)
            state = {"0.weight": self.w1[e].t(), "0.bias": self.b1[e, 0], "2.weight": self.w2[e].t()}
            state["2.bias"] = self.b2[e, 0]
            y.index_add_(0, t, torch.func.functional_call(self.template, state, (x[t],)) * w[t, s, None])
        return y


@case(flat(D), experts=N)
def hand_template_module():
    return Template()


class PickedOutputs(Mlps):
    """All outputs stacked, the chosen ones taken by advanced indexing."""

    def forward(self, x):
        rows = x.reshape(-1, D)
        w, ids = self.router(rows).softmax(-1).topk(K, -1)
        outputs = torch.stack([expert(rows) for expert in self.experts])
        return (outputs[ids, torch.arange(len(rows))[:, None]] * w[..., None]).sum(1).reshape(x.shape)


@case(seq(D), experts=N)
def hand_picked_outputs():
    return PickedOutputs()


class EmbeddedWeights(nn.Module):
    """Each expert's matrices are rows of an Embedding, looked up by the chosen id."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.router = nn.Embedding(N, D * M), nn.Embedding(N, M * D), nn.Linear(D, N)

    def forward(self, x):
        rows = x.reshape(-1, D)
        p, ids = self.router(rows).softmax(-1).max(-1)
        h = F.gelu(torch.bmm(rows[:, None], self.w1(ids).view(-1, D, M)))
        return (torch.bmm(h, self.w2(ids).view(-1, M, D)).squeeze(1) * p[:, None]).view_as(x)


@case(seq(D), experts=N)
def hand_embedded_weights():
    return EmbeddedWeights()


class Outputs(NamedTuple):
    hidden: torch.Tensor
    aux: dict[str, torch.Tensor]
    extra: tuple[Any, ...]


class ManyOutputs(Mlps):
    """A named tuple that holds a dict, a None and a list."""

    def forward(self, x):
        rows = x.reshape(-1, D)
        logits = self.router(rows)
        p = logits.softmax(-1)
        w, ids = p.topk(K, -1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(ids == e)
            y[t] += w[t, s, None] * expert(rows[t])
        load = F.one_hot(ids, N).float().mean((0, 1))
        return Outputs(y.view_as(x), {"loss": (load * p.mean(0)).sum() * N, "logits": logits}, (p.max(), None, [ids]))


@case(seq(D), experts=N)
def hand_named_tuple():
    return ManyOutputs()


class Interleaved(nn.Module):
    """Banks with the expert axis in the middle; sequence first inside, batch first outside."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N)
        self.w1, self.w2 = nn.Parameter(torch.randn(D, N, M) / 4), nn.Parameter(torch.randn(M, N, D) / 4)

    def forward(self, x):
        x = x.transpose(0, 1).contiguous()
        rows = x.view(-1, D)
        w, ids = self.router(rows).softmax(-1).topk(1, -1)
        y = torch.zeros_like(rows)
        for e in range(N):
            t = torch.nonzero(ids.squeeze(-1) == e).squeeze(-1)
            o = F.relu(rows.index_select(0, t) @ self.w1[:, e]) @ self.w2[:, e]
            y = y.index_copy(0, t, o * w.index_select(0, t))
        return y.view_as(x).transpose(0, 1)


@case(seq(D), experts=N)
def hand_expert_axis_in_the_middle():
    return Interleaved()


class NormPerExpert(Mlps):
    """Each expert has a LayerNorm of its own before its first matmul."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), *mlp()) for _ in range(N))
        for expert in self.experts:
            nn.init.normal_(expert[0].weight)

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(K, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(ids == e)
            y.index_add_(0, t, expert(x[t]) * w[t, s, None])
        return y


@case(flat(D), experts=N, expect="declined", reason="two matmuls with native_layer_norm.*would not pay")
def hand_norm_per_expert():
    return NormPerExpert()
