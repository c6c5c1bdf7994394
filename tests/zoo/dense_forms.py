"""Every expert runs on every token and a mostly-zero matrix picks: bmm, stack, einsum, vmap, softmax mixtures."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq


class BmmOutput(nn.Module):
    """GPT-OSS off the fast path: repeat, bmm, bmm, times scattered weights, sum."""

    def __init__(self, d=24, f=32, n=4, k=2):
        super().__init__()
        self.n, self.k, self.d, self.f = n, k, d, f
        self.router = nn.Linear(d, n)
        self.gate_up_proj = nn.Parameter(torch.randn(n, d, 2 * f) * 0.2)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(n, 2 * f))
        self.down_proj = nn.Parameter(torch.randn(n, f, d) * 0.2)
        self.down_proj_bias = nn.Parameter(torch.randn(n, d))

    def forward(self, hidden_states):
        batch_size = hidden_states.shape[0]
        hidden_states = hidden_states.reshape(-1, self.d)
        top, idx = torch.topk(self.router(hidden_states), self.k, dim=-1)
        scores = torch.zeros(hidden_states.shape[0], self.n).scatter_(1, idx, F.softmax(top, dim=1))
        h = hidden_states.repeat(self.n, 1).view(self.n, -1, self.d)
        gate_up = torch.bmm(h, self.gate_up_proj) + self.gate_up_proj_bias[..., None, :]
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
        glu = gate * torch.sigmoid(gate * 1.702)
        nxt = torch.bmm((up + 1) * glu, self.down_proj) + self.down_proj_bias[..., None, :]
        nxt = nxt.view(self.n, batch_size, -1, self.d)
        nxt = nxt * scores.transpose(0, 1).view(self.n, batch_size, -1)[..., None]
        return nxt.sum(dim=0), scores


@case(seq(24, scale=3.0), experts=4)
def dense_gpt_oss_bmm():
    return BmmOutput()


class Llama4Like(nn.Module):
    """The weight multiplies the expert's *input*; unselected experts see zeros. A shared expert is added."""

    def __init__(self, d=24, f=24, n=4, k=1):
        super().__init__()
        self.n, self.k, self.d = n, k, d
        self.router = nn.Linear(d, n, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(n, d, 2 * f) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(n, f, d) * 0.2)
        self.up = nn.Linear(d, 32, bias=False)
        self.down = nn.Linear(32, d, bias=False)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, self.d)
        logits = self.router(x)
        vals, idx = torch.topk(logits, self.k, dim=1)
        router_scores = torch.full_like(logits, float("-inf")).scatter_(1, idx, vals)
        router_scores = torch.sigmoid(router_scores.float()).to(x.dtype)
        routed_in = x.repeat(self.n, 1) * router_scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(routed_in.view(self.n, -1, self.d), self.gate_up_proj).chunk(2, dim=-1)
        routed_out = torch.bmm(up * F.silu(gate), self.down_proj).view(-1, self.d)
        out = self.down(F.silu(self.up(x)))
        out.add_(routed_out.reshape(self.n, -1, self.d).sum(dim=0))
        return out, router_scores


@case(seq(24), experts=4)
def dense_llama4_weight_on_input():
    return Llama4Like()


@case(seq(24), experts=6)
def dense_llama4_top2():
    return Llama4Like(n=6, k=2)


def expert(d, f):
    return nn.Sequential(nn.Linear(d, f), nn.ReLU(), nn.Linear(f, d))


class StackDense(nn.Module):
    """All outputs stacked; -inf scatter, softmax, weighted sum."""

    def __init__(self, d=16, f=24, n=5, k=2, how="mul"):
        super().__init__()
        self.k, self.how = k, how
        self.experts = nn.ModuleList([expert(d, f) for _ in range(n)])
        self.gating_network = nn.Linear(d, n)

    def gates(self, x):
        logits = self.gating_network(x)
        top, idx = logits.topk(self.k, dim=-1)
        return torch.full_like(logits, -torch.inf).scatter(-1, idx, top).softmax(-1)

    def forward(self, x):
        g = self.gates(x)
        if self.how == "mul":
            outs = torch.stack([e(x) for e in self.experts], dim=-1)
            return (outs * g.unsqueeze(-2)).sum(-1)
        if self.how == "einsum":
            return torch.einsum("...e,...ed->...d", g, torch.stack([e(x) for e in self.experts], dim=-2))
        if self.how == "matmul":
            outs = torch.stack([e(x) for e in self.experts], dim=2)
            return torch.matmul(g.unsqueeze(2), outs).squeeze(2)
        outs = torch.cat([e(x).unsqueeze(0) for e in self.experts])
        picked = torch.gather(outs, 0, g.topk(self.k, -1).indices.movedim(-1, 0).unsqueeze(-1).expand(-1, *x.shape))
        return (picked * g.topk(self.k, -1).values.movedim(-1, 0).unsqueeze(-1)).sum(0)


@case(seq(16), experts=5)
def dense_stack_mul():
    return StackDense()


@case(seq(16), experts=5)
def dense_stack_einsum():
    return StackDense(how="einsum")


@case(seq(16), experts=4)
def dense_stack_matmul():
    return StackDense(n=4, how="matmul")


@case(seq(16), experts=4)
def dense_cat_gather():
    return StackDense(n=4, how="gather")


class JacobsMixture(StackDense):
    """Adaptive mixtures of local experts (1991): a plain softmax over all of them."""

    def gates(self, x):
        return F.softmax(self.gating_network(x), dim=-1)


@case(flat(16), experts=4)
def dense_jacobs_softmax():
    return JacobsMixture(n=4)


@case(seq(16), experts=3)
def dense_jacobs_einsum():
    return JacobsMixture(n=3, how="einsum")


class EinsumAll(nn.Module):
    """Hidden for all experts in one einsum, then a masked combine."""

    def __init__(self, d=20, f=28, n=4, k=2):
        super().__init__()
        self.k = k
        self.wi = nn.Parameter(torch.randn(n, d, f) * 0.2)
        self.wo = nn.Parameter(torch.randn(n, f, d) * 0.2)
        self.wg = nn.Parameter(torch.randn(d, n))

    def forward(self, x):
        probs = torch.einsum("bsd,de->bse", x, self.wg).softmax(-1)
        kth = probs.topk(self.k, dim=-1).values[..., -1:]
        probs = torch.where(probs >= kth, probs, torch.zeros_like(probs))
        h = F.gelu(torch.einsum("bsd,edf->bsef", x, self.wi), approximate="tanh")
        return torch.einsum("bsef,efd,bse->bsd", h, self.wo, probs)


class EinsumTokens(EinsumAll):
    def forward(self, x):
        w, ids = (x @ self.wg).softmax(-1).topk(self.k, -1)
        gate = (F.one_hot(ids, len(self.wi)) * w.unsqueeze(-1)).sum(-2)
        hid = torch.relu(torch.einsum("th,ehi->tei", x, self.wi))
        return torch.einsum("te,tei,eih->th", gate, hid, self.wo)


@case(seq(20), experts=4)
def dense_einsum_threshold():
    return EinsumAll()


# Its einsum multiplies the weights into the hidden neurons before W_out: no expert's output is ever weighted.
@case(flat(20), experts=6, expect="declined", reason="stands something that is not element-wise.*weighs the hidden")
def dense_einsum_one_hot():
    return EinsumTokens(n=6)


class VmapExperts(nn.Module):
    """torch.func over stacked parameters, as the ensembling tutorial does it."""

    def __init__(self, n=4, d=16, f=24):
        super().__init__()
        nets = [expert(d, f) for _ in range(n)]
        params, _ = torch.func.stack_module_state(nets)
        self.stacked = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.detach()) for k, v in params.items()})
        self.names = {k.replace(".", "_"): k for k in params}
        self.base = [nets[0].to("meta")]
        self.router = nn.Linear(d, n)

    def forward(self, x):
        def call(params, inp):
            return torch.func.functional_call(self.base[0], params, (inp,))

        params = {self.names[k]: v for k, v in self.stacked.items()}
        outs = torch.vmap(call, in_dims=(0, None))(params, x)
        w, ids = self.router(x).softmax(-1).topk(2, -1)
        dense = torch.zeros(x.shape[0], outs.shape[0]).scatter_(1, ids, w)
        return (outs * dense.t().unsqueeze(-1)).sum(0)


@case(flat(16), experts=4, expect="either")
def dense_vmap():
    return VmapExperts()


class OneDimConvGroups(nn.Module):
    """All experts as one grouped 1x1 convolution; a sparse gate multiplies the groups."""

    def __init__(self, d=12, f=16, n=4):
        super().__init__()
        self.n, self.f = n, f
        self.inp = nn.Conv1d(d * n, f * n, 1, groups=n)
        self.out = nn.Conv1d(f * n, d * n, 1, groups=n)
        self.gate = nn.Linear(d, n)

    def forward(self, x):
        top, idx = self.gate(x).topk(2, -1)
        g = torch.zeros(x.shape[0], self.n).scatter(1, idx, top.softmax(-1))
        h = F.relu(self.inp(x.repeat(1, self.n).unsqueeze(-1)))
        o = self.out(h).view(x.shape[0], self.n, -1)
        return (o * g.unsqueeze(-1)).sum(1)


@case(flat(12), experts=4, expect="either", moe=None)
def dense_grouped_conv():
    return OneDimConvGroups()


class GroupedRows(nn.Module):
    """A group of two 1x1 convolutions over the tokens for each expert; the gate's sum is a product of its own."""

    def __init__(self, d=16, f=24, n=4):
        super().__init__()
        self.n, self.gate = n, nn.Linear(d, n)
        self.first, self.second = nn.Conv1d(n * d, n * f, 1, groups=n), nn.Conv1d(n * f, n * d, 1, groups=n)

    def forward(self, x):
        weights, rows = self.gate(x).softmax(-1), x.transpose(1, 2).repeat(1, self.n, 1)
        each = self.second(F.relu(self.first(rows))).view(len(x), self.n, x.shape[-1], -1)
        return torch.einsum("bedt,bte->btd", each, weights)


@case(seq(16), experts=4, expect="declined", reason="^it computes convolutions of 1 in 4 groups")
def dense_grouped_conv_of_rows():
    return GroupedRows()
