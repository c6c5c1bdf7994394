"""Loops over every expert, token, or slot: torch.where, boolean masks, nested k-loops, torch.unique."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq


def mlp(d, m, act=nn.GELU):
    return nn.Sequential(nn.Linear(d, m), act(), nn.Linear(m, d))


class Base(nn.Module):
    """Softmax, top-k, renormalise; how the tokens reach the experts is ``mix``."""

    def __init__(self, d=20, m=28, n=5, k=2, act=nn.GELU):
        super().__init__()
        self.n, self.k = n, k
        self.router = nn.Linear(d, n)
        self.experts = nn.ModuleList(mlp(d, m, act) for _ in range(n))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        p, ids = self.router(tokens).softmax(-1).topk(self.k, -1)
        p = p / p.sum(-1, keepdim=True)
        return self.mix(tokens, p, ids).reshape(x.shape)


class WhereLoop(Base):
    def mix(self, x, p, ids):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(ids == i)
            out[token] += p[token, slot, None] * expert(x[token])
        return out


class WhereLoopNumel(Base):
    def mix(self, x, p, ids):
        out = torch.zeros_like(x)
        for i in range(self.n):
            token, slot = torch.where(ids == i)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, self.experts[i](x[token]) * p[token, slot].unsqueeze(-1))
        return out


class AnyLoop(Base):
    def mix(self, x, p, ids):
        out = torch.zeros_like(x)
        for i, f in enumerate(self.experts):
            mask = (ids == i).any(dim=-1)
            if mask.any():
                w = (p * (ids == i)).sum(-1)
                out[mask] += f(x[mask]) * w[mask].unsqueeze(1)
        return out


class BooleanMask(Base):
    def mix(self, x, p, ids):
        y = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            m = (ids == e).any(-1)
            w = torch.where(ids == e, p, torch.zeros_like(p)).sum(-1, keepdim=True)
            y[m] += f(x[m]) * w[m]
        return y


class NestedK(Base):
    def mix(self, x, p, ids):
        y = torch.zeros_like(x)
        for k in range(self.k):
            for e in range(self.n):
                mask = ids[:, k] == e
                if mask.any():
                    y[mask] += p[mask, k : k + 1] * self.experts[e](x[mask])
        return y


class UniqueLoop(Base):
    def mix(self, x, p, ids):
        y = torch.zeros_like(x)
        for slot in range(self.k):
            for e in torch.unique(ids[:, slot]):
                rows = (ids[:, slot] == e).nonzero().flatten()
                y[rows] = y[rows] + self.experts[int(e)](x[rows]) * p[rows, slot][:, None]
        return y


class PerToken(Base):
    def mix(self, x, p, ids):
        y = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for k in range(self.k):
                y[t] += p[t, k] * self.experts[ids[t, k].item()](x[t])
        return y


class PerTokenStacked(Base):
    def mix(self, x, p, ids):
        rows = []
        for token, weights, chosen in zip(x, p, ids):
            rows.append(sum(w * self.experts[int(c)](token.unsqueeze(0)).squeeze(0) for w, c in zip(weights, chosen)))
        return torch.stack(rows)


class ScatterPerSlot(Base):
    """Every slot fills its own buffer; the buffers are weighted and added at the end."""

    def mix(self, x, p, ids):
        slots = x.new_zeros(self.k, *x.shape)
        for e, f in enumerate(self.experts):
            rows, slot = (ids == e).nonzero(as_tuple=True)
            slots[slot, rows] = f(x[rows])
        return torch.einsum("tk,kth->th", p, slots)


class MaskedMultiply(Base):
    """Runs each expert on all tokens and multiplies by a mask."""

    def mix(self, x, p, ids):
        y = 0
        for e in range(self.n):
            w = ((ids == e).to(p.dtype) * p).sum(dim=1)
            y = y + w[:, None] * self.experts[e](x)
        return y


class RangeIndexSelect(Base):
    def mix(self, x, p, ids):
        flat_ids, flat_p = ids.flatten(), p.flatten()
        owner = torch.arange(x.size(0)).repeat_interleave(self.k)
        y = torch.zeros_like(x)
        for e in range(self.n):
            pos = torch.nonzero(flat_ids.eq(e), as_tuple=False).squeeze(1)
            got = self.experts[e](torch.index_select(x, 0, owner[pos])).mul(flat_p[pos].view(-1, 1))
            y.scatter_add_(0, owner[pos].unsqueeze(1).expand_as(got), got)
        return y


@case(seq(20), experts=5)
def all_where():
    return WhereLoop()


@case(seq(20), experts=5)
def all_where_if_numel():
    return WhereLoopNumel()


@case(seq(20), experts=5)
def all_any_mask():
    return AnyLoop(act=nn.SiLU)


@case(seq(20), experts=5)
def all_boolean_mask():
    return BooleanMask()


@case(seq(20), experts=4)
def all_nested_k_loop():
    return NestedK(n=4, act=nn.ReLU)


@case(seq(20), experts=4)
def all_unique_loop():
    return UniqueLoop(n=4, act=nn.ReLU)


@case(seq(20), experts=4)
def all_per_token_loop():
    return PerToken(n=4)


@case(flat(20), experts=4)
def all_per_token_stack():
    return PerTokenStacked(n=4)


@case(seq(20), experts=6)
def all_slot_buffers():
    return ScatterPerSlot(n=6, k=3)


@case(seq(20), experts=5)
def all_masked_multiply():
    return MaskedMultiply()


@case(flat(20), experts=8)
def all_scatter_add():
    return RangeIndexSelect(n=8)


@case(flat(20), experts=4)
def all_top1():
    return WhereLoopNumel(n=4, k=1)


@case(flat(20), experts=2)
def all_two_experts_k1():
    return BooleanMask(n=2, k=1)


@case(flat(20), experts=4)
def all_k_equals_e():
    return WhereLoop(n=4, k=4)


class SwitchFFN(nn.Module):
    """Top-1, index lists kept in a Python list, output written in place."""

    def __init__(self, d_model=16, d_ff=32, n_experts=6):
        super().__init__()
        self.n_experts = n_experts
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Dropout(0.1), nn.Linear(d_ff, d_model))
                for _ in range(n_experts)
            ]
        )
        self.switch = nn.Linear(d_model, n_experts)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        seq_len, batch_size, d_model = x.shape
        x = x.view(-1, d_model)
        route_prob = self.softmax(self.switch(x))
        route_prob_max, routes = torch.max(route_prob, dim=-1)
        indexes_list = [torch.eq(routes, i).nonzero(as_tuple=True)[0] for i in range(self.n_experts)]
        final_output = x.new_zeros(x.shape)
        counts = x.new_tensor([len(indexes_list[i]) for i in range(self.n_experts)])
        expert_output = [self.experts[i](x[indexes_list[i], :]) for i in range(self.n_experts)]
        for i in range(self.n_experts):
            final_output[indexes_list[i], :] = expert_output[i]
        final_output = final_output * route_prob_max.view(-1, 1)
        return final_output.view(seq_len, batch_size, d_model), counts, route_prob.sum(0)


# The counts it returns are a tensor made from Python lengths, which a graph would freeze.
@case(seq(16), experts=6, expect="declined", reason="a tensor that its forward makes outside PyTorch .*changes with")
def all_labml_switch():
    return SwitchFFN()


class TopPRouting(Base):
    """A token takes experts until their probabilities add up to 0.6, so K varies from token to token."""

    def forward(self, x):
        t = x.reshape(-1, x.shape[-1])
        probs = F.softmax(self.router(t), dim=-1)
        sorted_p, order = probs.sort(dim=-1, descending=True)
        keep_sorted = (sorted_p.cumsum(-1) - sorted_p) < 0.6
        keep = torch.zeros_like(keep_sorted).scatter(1, order, keep_sorted)
        y = torch.zeros_like(t)
        for e, expert in enumerate(self.experts):
            rows = keep[:, e].nonzero().squeeze(-1)
            if len(rows):
                y[rows] += probs[rows, e].unsqueeze(-1) * expert(t[rows])
        return y.view_as(x)


@case(seq(20), experts=5)
def router_top_p():
    return TopPRouting()
