"""Static capacity: one_hot and cumsum give each token a place in its expert's buffer; some tokens are dropped."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq


class GShard(nn.Module):
    """Top-2 gating with dispatch and combine einsums; capacity is large enough for every token."""

    def __init__(self, model_dim=16, hidden=24, experts=4):
        super().__init__()
        self.E = experts
        self.wg = nn.Linear(model_dim, experts, bias=False)
        self.wi = nn.Parameter(torch.randn(experts, model_dim, hidden) * 0.25)
        self.wo = nn.Parameter(torch.randn(experts, hidden, model_dim) * 0.2)

    def forward(self, inputs):
        x = inputs.reshape(-1, inputs.shape[-1])
        S = C = x.shape[0]
        gates = F.softmax(self.wg(x), dim=1)
        indices1_s = torch.argmax(gates, dim=1)
        mask1 = F.one_hot(indices1_s, num_classes=self.E)
        logits_except1 = gates.masked_fill(mask1.bool(), float("-inf"))
        mask2 = F.one_hot(torch.argmax(logits_except1, dim=1), num_classes=self.E)
        locations1 = torch.cumsum(mask1, dim=0) - 1
        locations2 = torch.cumsum(mask2, dim=0) - 1 + torch.sum(mask1, dim=0, keepdim=True)
        l_aux = torch.mean(gates.mean(0) * mask1.float().mean(0)) * self.E * self.E
        mask1, mask2 = mask1 * torch.lt(locations1, C), mask2 * torch.lt(locations2, C)
        loc1, loc2 = torch.sum(locations1 * mask1, dim=1), torch.sum(locations2 * mask2, dim=1)
        g1, g2 = torch.einsum("se,se->s", gates, mask1.float()), torch.einsum("se,se->s", gates, mask2.float())
        denom = torch.clamp(g1 + g2, min=torch.finfo(g1.dtype).eps)
        gates1, gates2 = (g1 / denom)[:, None] * mask1, (g2 / denom)[:, None] * mask2
        combine = torch.einsum("se,sc->sec", gates1, F.one_hot(loc1, 2 * S).float())
        combine = combine + torch.einsum("se,sc->sec", gates2, F.one_hot(loc2, 2 * S).float())
        dispatched = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
        h = F.relu(torch.einsum("ecm,emh->ech", dispatched, self.wi))
        y = torch.einsum("ech,ehm->ecm", h, self.wo)
        return torch.einsum("sec,ecm->sm", combine, y).reshape_as(inputs), l_aux


class NanoMoE(nn.Module):
    """Top-k slots compete for places in slot-major order; expert batches are (E, C, d), two bmms."""

    def __init__(self, d=16, n_exp=4, top_k=2, capacity_factor=None, min_capacity=4):
        super().__init__()
        self.d, self.n_exp, self.top_k = d, n_exp, top_k
        self.capacity_factor, self.min_capacity = capacity_factor, min_capacity
        self.w_g = nn.Linear(d, n_exp, bias=False)
        self.c_fc = nn.Parameter(torch.randn(n_exp, d, 4 * d) * 0.2)
        self.c_proj = nn.Parameter(torch.randn(n_exp, 4 * d, d) * 0.15)

    def capacity(self, tokens):
        if self.capacity_factor is None:
            return tokens
        return max(math.floor(self.top_k * self.capacity_factor * tokens / self.n_exp), self.min_capacity)

    def forward(self, x):
        B, T, C = x.size()
        n_tok = B * T
        logits = self.w_g(x)
        top_k_logits, top_k_indices = logits.topk(self.top_k, dim=-1)
        probs = torch.full_like(logits, float("-inf")).scatter_(-1, top_k_indices, top_k_logits).softmax(-1)
        cap = self.capacity(n_tok)
        exp_mask = F.one_hot(top_k_indices, num_classes=self.n_exp).view(n_tok, self.top_k, self.n_exp).permute(1, 0, 2)
        exp_rank = exp_mask.reshape(self.top_k * n_tok, self.n_exp).cumsum(0) - 1
        exp_rank = exp_rank.reshape(self.top_k, n_tok, self.n_exp)
        exp_mask = exp_mask * torch.lt(exp_rank, cap)
        exp_rank = torch.sum(exp_mask * exp_rank, dim=-1)
        exp_weights = exp_mask * probs.view(1, n_tok, self.n_exp)
        cb_weight = torch.sum(exp_weights.unsqueeze(3) * F.one_hot(exp_rank, cap).unsqueeze(2), dim=0)
        exp_batches = cb_weight.bool().permute(1, 2, 0).type(x.dtype) @ x.view(n_tok, C)
        out = torch.bmm(F.gelu(torch.bmm(exp_batches, self.c_fc)), self.c_proj)
        return (cb_weight.view(n_tok, -1) @ out.view(-1, C)).view(B, T, C)


@case(seq(16), experts=4)
def capacity_gshard_ample():
    return GShard()


@case(seq(16), experts=4)
def capacity_nano_moe_ample():
    return NanoMoE()


# Its capacity is a rounded function of the token count, baked into shapes: no one graph holds for all counts.
@case(seq(16), experts=4, expect="declined", reason="the integer 12 or .*no simple function of the input's shape")
def capacity_nano_moe_drops():
    return NanoMoE(capacity_factor=0.5, min_capacity=2)


class Switch(nn.Module):
    """Top-1; tokens beyond capacity give zero, or pass through when ``keep_dropped``."""

    def __init__(self, d=16, f=24, n=4, capacity=3, keep_dropped=False):
        super().__init__()
        self.n, self.capacity, self.keep_dropped = n, capacity, keep_dropped
        self.classifier = nn.Linear(d, n, bias=False)
        self.experts = nn.ModuleDict({f"expert_{i}": self.ff(d, f) for i in range(n)})

    @staticmethod
    def ff(d, f):
        return nn.Sequential(nn.Linear(d, f, bias=False), nn.ReLU(), nn.Linear(f, d, bias=False))

    def forward(self, hidden_states):
        b, s, d = hidden_states.shape
        router_probs = F.softmax(self.classifier(hidden_states), dim=-1)
        expert_index = F.one_hot(torch.argmax(router_probs, dim=-1), num_classes=self.n)
        priority = torch.cumsum(expert_index, dim=-2)
        expert_index = expert_index * (priority <= self.capacity)
        top_prob = torch.max(router_probs, dim=-1).values.unsqueeze(-1)
        nxt = hidden_states.clone() if self.keep_dropped else torch.zeros_like(hidden_states)
        for i, name in enumerate(self.experts):
            token_indices = expert_index[:, :, i].bool()
            got = self.experts[name](hidden_states[token_indices]).to(nxt.dtype)
            nxt[token_indices] = got * top_prob[token_indices] if self.keep_dropped else got
        return nxt if self.keep_dropped else nxt * top_prob


@case(seq(16), experts=4)
def capacity_switch_drops_to_zero():
    return Switch()


@case(seq(16), experts=4)
def capacity_switch_passes_through():
    return Switch(keep_dropped=True, capacity=2)


class TutelLike(nn.Module):
    """Rows are scattered to (E * C) places, padded places hold zeros, results are gathered back."""

    def __init__(self, d=16, f=20, n=4, k=2, prescore=False):
        super().__init__()
        self.n, self.k, self.prescore = n, k, prescore
        self.wg = nn.Linear(d, n, bias=False)
        self.fc1_w, self.fc1_b = nn.Parameter(torch.randn(n, f, d) * 0.3), nn.Parameter(torch.randn(n, 1, f))
        self.fc2_w, self.fc2_b = nn.Parameter(torch.randn(n, f, d) * 0.3), nn.Parameter(torch.randn(n, 1, d))

    def forward(self, x):
        T = x.size(0)
        scores, ids = F.softmax(self.wg(x), dim=1).topk(self.k, dim=1)
        masks = [F.one_hot(ids[:, i], self.n) for i in range(self.k)]
        counted, places = torch.zeros(self.n, dtype=torch.long), []
        for m in masks:
            places.append(((torch.cumsum(m, 0) - 1 + counted) * m).sum(1))
            counted = counted + m.sum(0)
        cap = self.k * T
        buffer = torch.zeros(self.n * cap, x.size(1))
        for i in range(self.k):
            rows = x * scores[:, i : i + 1] if self.prescore else x
            buffer = buffer.index_put((ids[:, i] * cap + places[i],), rows)
        y = buffer.view(self.n, cap, -1)
        y = torch.matmul(F.relu(torch.matmul(y, self.fc1_w.transpose(1, 2)) + self.fc1_b), self.fc2_w) + self.fc2_b
        y = y.view(self.n * cap, -1)
        picked = [y[ids[:, i] * cap + places[i]] for i in range(self.k)]
        return sum(picked) if self.prescore else sum(p * scores[:, i : i + 1] for i, p in enumerate(picked))


@case(flat(16), experts=4)
def capacity_tutel():
    return TutelLike()


@case(flat(16), experts=4)
def capacity_tutel_prescore():
    return TutelLike(prescore=True)


class MegablocksPadded(nn.Module):
    """Binned gather: sorted rows copied to (E, max count, d), bmm, binned scatter."""

    def __init__(self, d=16, f=24, n=5, k=2):
        super().__init__()
        self.n, self.k = n, k
        self.layer = nn.Linear(d, n, bias=False)
        self.w1, self.v1 = nn.Parameter(torch.randn(n, d, f) * 0.3), nn.Parameter(torch.randn(n, d, f) * 0.3)
        self.w2 = nn.Parameter(torch.randn(n, f, d) * 0.2)

    def forward(self, x):
        expert_weights, top_experts = self.layer(x).softmax(-1).topk(self.k, dim=-1)
        bin_ids, indices = torch.sort(top_experts.flatten(), stable=True)
        per_expert = torch.histc(bin_ids.float(), self.n, 0, self.n - 1).long()
        starts = per_expert.cumsum(0) - per_expert
        place = torch.arange(bin_ids.numel()) - starts[bin_ids]
        bins = x.new_zeros(self.n, int(per_expert.max()), x.shape[1])
        bins[bin_ids, place] = x[indices // self.k]
        y = torch.bmm(F.silu(torch.bmm(bins, self.w1)) * torch.bmm(bins, self.v1), self.w2)
        y = y[bin_ids, place] * expert_weights.flatten()[indices].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, indices // self.k, y)


@case(flat(16), experts=5)
def capacity_megablocks_bins():
    return MegablocksPadded()


class LucidrainsLike(nn.Module):
    """Top-2 with thresholded second expert, GEGLU experts over (e, b c, d), deterministic in eval."""

    def __init__(self, dim=16, num_experts=4, mult=2):
        super().__init__()
        self.n = num_experts
        self.to_gates = nn.Linear(dim, num_experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(num_experts, dim, dim * mult * 2) * 0.25)
        self.w2 = nn.Parameter(torch.randn(num_experts, dim * mult, dim) * 0.2)
        self.mult_bias = nn.Parameter(torch.rand(num_experts, 1, dim * mult) + 0.5)

    def forward(self, x):
        b, n, d = x.shape
        raw = self.to_gates(x).softmax(-1)
        gates, idx = raw.topk(2, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True).clamp(min=1e-9)
        route = torch.stack([torch.ones_like(gates[..., 0], dtype=torch.bool), gates[..., 1] > 0.2], -1)
        one_hot = F.one_hot(idx, self.n) * route.unsqueeze(-1)
        order = one_hot.permute(0, 2, 1, 3).reshape(b, 2 * n, self.n)
        pos = (order.cumsum(1) - order).reshape(b, 2, n, self.n).permute(0, 2, 1, 3)
        slot = F.one_hot((pos * one_hot).sum(-1), 2 * n) * route.unsqueeze(-1)
        combine = torch.einsum("bnk,bnke,bnkc->bnec", gates, one_hot.float(), slot.float())
        ein = torch.einsum("bnec,bnd->ebcd", (combine > 0).float(), x).reshape(self.n, -1, d)
        h, gate = torch.einsum("emd,edh->emh", ein, self.w1).chunk(2, dim=-1)
        out = torch.einsum("emh,ehd->emd", F.gelu(gate) * h * self.mult_bias, self.w2)
        return torch.einsum("bnec,ebcd->bnd", combine, out.reshape(self.n, b, -1, d))


@case(seq(16), experts=4, expect="either")
def capacity_st_moe_mult_bias():
    return LucidrainsLike()


class Mesh(nn.Module):
    """Slots of each sequence in products with codes; the second expert serves where its weight is above a limit, which
    the untrained router's always is."""

    def __init__(self, slots=None, d=16, hid=24, n=4):
        super().__init__()
        self.gate, self.slots = nn.Linear(d, n, bias=False), slots
        self.wi, self.wo = nn.Parameter(torch.randn(n, d, hid) * 0.2), nn.Parameter(torch.randn(n, hid, d) * 0.2)

    def forward(self, x):
        slots = self.slots or x.shape[1]
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        serves = torch.stack((torch.ones_like(weights[..., 0]), (weights[..., 1] > 0.2).float()), -1)
        masks = F.one_hot(ids, self.gate.out_features).float() * serves[..., None]
        combine, taken = 0, 0
        for k in range(2):
            place = (masks[:, :, k].cumsum(1) - masks[:, :, k] + taken) * masks[:, :, k]
            mask = masks[:, :, k] * (place < slots)
            taken = taken + mask.sum(1, keepdim=True)
            code = F.one_hot(place.sum(-1).long().clamp(max=slots - 1), slots).float()
            combine = combine + weights[:, :, k, None, None] * mask[..., None] * code[:, :, None]
        given = torch.einsum("bnd,bnec->becd", x, (combine > 0).to(x.dtype))
        y = torch.einsum("bech,ehd->becd", F.gelu(torch.einsum("becd,edh->bech", given, self.wi)), self.wo)
        return torch.einsum("becd,bnec->bnd", y, combine)


@case(seq(16), experts=4)
def capacity_mesh_with_a_second_above_a_limit():
    return Mesh()


@case(seq(16), experts=4)
def capacity_mesh_with_few_slots():
    return Mesh(slots=3)
