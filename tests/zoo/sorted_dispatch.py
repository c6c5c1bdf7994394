"""Dispatch by sorting: slices of a sorted batch, splits, per-expert sub-batches."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq


class DeepseekMLP(nn.Module):
    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = F.silu

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DeepseekMoE(nn.Module):
    """DeepSeek's remote code: counts leave the tape through ``.cpu().numpy()``."""

    def __init__(self, n_routed=6, k=3, shared=True, cumsum=False):
        super().__init__()
        self.n_routed, self.num_experts_per_tok, self.cumsum = n_routed, k, cumsum
        self.experts = nn.ModuleList([DeepseekMLP(24, 16) for _ in range(n_routed)])
        self.weight = nn.Parameter(torch.empty((n_routed, 24)).normal_(std=0.2))
        self.shared_experts = DeepseekMLP(24, 32) if shared else None

    def gate(self, x):
        scores = F.linear(x.float(), self.weight.float(), None).softmax(dim=-1, dtype=torch.float32)
        topk_weight, topk_idx = torch.topk(scores, k=self.num_experts_per_tok, dim=-1, sorted=False)
        return topk_idx, topk_weight * 2.5

    def forward(self, hidden_states):
        identity, orig_shape = hidden_states, hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        topk_idx, topk_weight = self.gate(hidden_states)
        y = (self.numpy_infer if self.cumsum else self.moe_infer)(hidden_states, topk_idx, topk_weight).view(
            *orig_shape
        )
        return y if self.shared_experts is None else y + self.shared_experts(identity)

    @torch.no_grad()
    def moe_infer(self, x, topk_ids, topk_weight):
        cnts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        cnts.scatter_(1, topk_ids, 1)
        tokens_per_expert = cnts.sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        tokens_per_expert = tokens_per_expert.cpu().numpy()
        outputs, start_idx = [], 0
        for i, num_tokens in enumerate(tokens_per_expert):
            end_idx = start_idx + num_tokens
            if num_tokens == 0:
                continue
            outputs.append(self.experts[i](sorted_tokens[start_idx:end_idx]))
            start_idx = end_idx
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        return (
            new_x.view(*topk_ids.shape, -1)
            .type(topk_weight.dtype)
            .mul_(topk_weight.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(new_x.dtype)
        )

    @torch.no_grad()
    def numpy_infer(self, x, ids, weights):
        flat_weights, flat_ids = weights.view(-1, 1), ids.view(-1)
        expert_cache = torch.zeros_like(x)
        idxs = flat_ids.argsort()
        ends = np.cumsum(flat_ids.bincount().cpu().numpy(), axis=0)
        token_idxs = idxs // self.num_experts_per_tok
        for i, end_idx in enumerate(ends):
            start_idx = 0 if i == 0 else ends[i - 1]
            if start_idx == end_idx:
                continue
            exp_token_idx = token_idxs[start_idx:end_idx]
            expert_out = self.experts[i](x[exp_token_idx])
            expert_out.mul_(flat_weights[idxs[start_idx:end_idx]])
            expert_cache.scatter_reduce_(0, exp_token_idx.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum")
        return expert_cache


@case(seq(24), experts=6)
def sort_deepseek_v3_infer():
    return DeepseekMoE()


@case(seq(24), experts=8)
def sort_deepseek_v1_numpy():
    return DeepseekMoE(n_routed=8, k=2, cumsum=True)


@case(seq(24), experts=4)
def sort_deepseek_no_shared():
    return DeepseekMoE(n_routed=4, shared=False)


class GraniteLike(nn.Module):
    """Sorted once, split by a ``.tolist()``, a stacked weight in each F.linear, one index_add."""

    def __init__(self, d=24, f=20, n=6, k=2):
        super().__init__()
        self.n, self.k = n, k
        self.input_linear = nn.Parameter(torch.randn(n, 2 * f, d) * d**-0.5)
        self.output_linear = nn.Parameter(torch.randn(n, d, f) * f**-0.5)
        self.router = nn.Linear(d, n, bias=False)

    def forward(self, layer_input):
        bsz, length, emb = layer_input.size()
        x = layer_input.reshape(-1, emb)
        top_k_logits, top_k_indices = self.router(x).float().topk(self.k, dim=1)
        top_k_gates = torch.softmax(top_k_logits, dim=1).type_as(x)
        gates = torch.zeros([len(x), self.n]).scatter(1, top_k_indices, 1).long()
        expert_size = gates.sum(0).tolist()
        _, index_sorted_experts = top_k_indices.flatten().sort(0)
        batch_index = index_sorted_experts.div(self.k, rounding_mode="trunc")
        batch_gates = top_k_gates.flatten()[index_sorted_experts]
        chunks = x[batch_index].split(expert_size, dim=0)
        hidden = [F.linear(c, self.input_linear[i]) for i, c in enumerate(chunks)]
        a, b = torch.cat(hidden, dim=0).chunk(2, dim=-1)
        chunks = (F.silu(a) * b).split(expert_size, dim=0)
        out = torch.cat([F.linear(c, self.output_linear[i]) for i, c in enumerate(chunks)], dim=0)
        out = out * batch_gates[:, None]
        zeros = torch.zeros((bsz * length, emb), dtype=out.dtype)
        return zeros.index_add(0, batch_index, out).view(bsz, length, emb)


@case(seq(24), experts=6)
def split_granite():
    return GraniteLike()


class SparseDispatcher:
    """After the dispatcher that half of GitHub copies: nonzero, split, cat, index_add."""

    def __init__(self, num_experts, gates):
        sorted_experts, index_sorted_experts = torch.nonzero(gates).sort(0)
        _, self._expert_index = sorted_experts.split(1, dim=1)
        self._batch_index = torch.nonzero(gates)[index_sorted_experts[:, 1], 0]
        self._part_sizes = (gates > 0).sum(0).tolist()
        self._gates, self._n = gates, num_experts
        self._nonzero_gates = torch.gather(gates[self._batch_index.flatten()], 1, self._expert_index)

    def dispatch(self, inp):
        return torch.split(inp[self._batch_index].squeeze(1), self._part_sizes, dim=0)

    def combine(self, expert_out):
        stitched = torch.cat(expert_out, 0).mul(self._nonzero_gates)
        zeros = torch.zeros(self._gates.size(0), expert_out[-1].size(1))
        return zeros.index_add(0, self._batch_index, stitched.float())


class ExpertMLP(nn.Module):
    def __init__(self, input_size, output_size, hidden_size):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, output_size)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)))


class NoisyTopKMoE(nn.Module):
    """Shazeer's noisy top-k; no noise in eval. Also returns a load-balancing loss."""

    def __init__(self, input_size=18, output_size=10, num_experts=6, hidden_size=24, k=2):
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.experts = nn.ModuleList([ExpertMLP(input_size, output_size, hidden_size) for _ in range(num_experts)])
        self.w_gate = nn.Parameter(torch.randn(input_size, num_experts))
        self.w_noise = nn.Parameter(torch.zeros(input_size, num_experts))

    def forward(self, x, loss_coef=1e-2):
        logits = x @ self.w_gate
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.w_noise) + 1e-2)
        top_k_logits, top_k_indices = F.softmax(logits, 1).topk(self.k, dim=1)
        top_k_gates = top_k_logits / (top_k_logits.sum(1, keepdim=True) + 1e-6)
        gates = torch.zeros_like(logits).scatter(1, top_k_indices, top_k_gates)
        importance, load = gates.sum(0), (gates > 0).sum(0).float()
        loss = sum(v.var() / (v.mean() ** 2 + 1e-10) for v in (importance, load)) * loss_coef
        dispatcher = SparseDispatcher(self.num_experts, gates)
        expert_inputs = dispatcher.dispatch(x)
        expert_outputs = [self.experts[i](expert_inputs[i]) for i in range(self.num_experts)]
        return dispatcher.combine(expert_outputs), loss


@case(flat(18), experts=6)
def split_noisy_topk_dispatcher():
    return NoisyTopKMoE()


class FastMoELike(nn.Module):
    """Scatter into expert order, one fused linear per layer with batch counts, gather back, bmm with the gate."""

    def __init__(self, d=16, hidden=32, n=4, k=2):
        super().__init__()
        self.k = k
        self.htoh4 = nn.ParameterDict({"weight": torch.randn(n, hidden, d) * 0.2, "bias": torch.randn(n, hidden)})
        self.h4toh = nn.ParameterDict({"weight": torch.randn(n, d, hidden) * 0.2, "bias": torch.randn(n, d)})
        self.gate = nn.Linear(d, n)

    @staticmethod
    def fmoe_linear(p, inp, fwd_expert_count):
        outs, base = [], 0
        for i, c in enumerate(fwd_expert_count.tolist()):
            outs.append(inp[base : base + c] @ p["weight"][i].t() + p["bias"][i])
            base += c
        return torch.cat(outs)

    def forward(self, moe_inp):
        val, idx = torch.topk(self.gate(moe_inp), k=self.k, dim=-1)
        score = F.softmax(val, dim=-1).unsqueeze(1)
        pos = torch.sort(idx.view(-1), stable=True).indices
        count = torch.bincount(idx.view(-1), minlength=len(self.htoh4["weight"]))
        x = torch.index_select(moe_inp, 0, torch.div(pos, self.k, rounding_mode="floor"))
        x = F.gelu(self.fmoe_linear(self.htoh4, x, count))
        x = self.fmoe_linear(self.h4toh, x, count)
        outp = torch.zeros(idx.numel(), x.shape[-1]).index_copy_(0, pos, x)
        return torch.bmm(score, outp.view(-1, self.k, x.shape[-1])).squeeze(1)


@case(flat(16), experts=4)
def split_fastmoe():
    return FastMoELike()


class BiasesOfTheJoined(FastMoELike):
    """The products of all experts are joined, and each row gets its expert's bias from one sum after that."""

    @staticmethod
    def linear(p, inp, count, ids):
        parts = zip(inp.split(count.tolist()), p["weight"], strict=True)
        return torch.cat([rows @ w.t() for rows, w in parts]) + p["bias"][ids]

    def forward(self, x):
        val, idx = torch.topk(self.gate(x), k=self.k, dim=-1)
        ids, pos = torch.sort(idx.view(-1), stable=True)
        count = torch.bincount(ids, minlength=len(self.htoh4["weight"]))
        h = F.gelu(self.linear(self.htoh4, x[pos // self.k], count, ids))
        h = self.linear(self.h4toh, h, count, ids) * F.softmax(val, dim=-1).view(-1, 1)[pos]
        return torch.zeros_like(x).index_add_(0, pos // self.k, h)


@case(flat(16), experts=4)
def split_biases_of_the_joined():
    return BiasesOfTheJoined()
