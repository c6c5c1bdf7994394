"""Loops over the experts that were hit: one_hot, permute, nonzero, index_add_ (the Hugging Face way)."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, seq


class BlockSparseTop2MLP(nn.Module):
    def __init__(self, hidden_dim, ffn_dim):
        super().__init__()
        self.w1 = nn.Linear(hidden_dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(hidden_dim, ffn_dim, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states):
        current_hidden_states = self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states)
        return self.w2(current_hidden_states)


class SparseMoeBlock(nn.Module):
    """Mixtral's, with module-list experts; ``only_hit`` loops over nonzero experts only."""

    def __init__(self, hidden_dim=32, ffn_dim=48, num_experts=8, top_k=2, norm=True, only_hit=True):
        super().__init__()
        self.num_experts, self.top_k, self.norm, self.only_hit = num_experts, top_k, norm, only_hit
        self.gate = nn.Linear(hidden_dim, num_experts, bias=False)
        self.experts = nn.ModuleList([BlockSparseTop2MLP(hidden_dim, ffn_dim) for _ in range(num_experts)])

    def forward(self, hidden_states):
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        router_logits = self.gate(hidden_states)
        routing_weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
        if self.norm:
            routing_weights /= routing_weights.sum(dim=-1, keepdim=True)
        routing_weights = routing_weights.to(hidden_states.dtype)
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        if self.only_hit:
            which = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        else:
            which = range(self.num_experts)
        for expert_idx in which:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        final_hidden_states = final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)
        return final_hidden_states, router_logits


@case(seq(32), experts=8)
def hit_mixtral():
    return SparseMoeBlock()


@case(seq(32), experts=6)
def hit_mixtral_all_experts():
    return SparseMoeBlock(num_experts=6, top_k=3, only_hit=False)


@case(seq(32), experts=4)
def hit_olmoe_not_renormalised():
    return SparseMoeBlock(num_experts=4, norm=False)


class StackedExperts(nn.Module):
    """Two 3-D parameters; the loop slices them; id == E is a sentinel that no expert serves."""

    def __init__(self, E, H, I):
        super().__init__()
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H) * H**-0.5)
        self.down_proj = nn.Parameter(torch.randn(E, H, I) * I**-0.5)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
            gate, up = F.linear(hidden_states[token_idx], self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            current = F.linear(F.silu(gate) * up, self.down_proj[expert_idx])
            current = current * top_k_weights[token_idx, top_k_pos, None]
            final.index_add_(0, token_idx, current.to(final.dtype))
        return final


class SentinelMoE(nn.Module):
    """Tokens whose best score is low lose their second expert: its id becomes E."""

    def __init__(self, sentinel=True):
        super().__init__()
        self.gate = nn.Linear(24, 4, bias=False)
        self.experts = StackedExperts(4, 24, 40)
        self.sentinel = sentinel

    def forward(self, x):
        h = x.flatten(0, 1)
        w, idx = self.gate(h).softmax(-1).topk(2)
        if self.sentinel:
            idx = idx.masked_fill(w < 0.25, 4)
        return self.experts(h, idx, w).view_as(x)


@case(seq(24), experts=4)
def hit_stacked_experts():
    return SentinelMoE(sentinel=False)


@case(seq(24), experts=4)
def hit_sentinel_ids():
    return SentinelMoE()


class Qwen2MLP(nn.Module):
    def __init__(self, d, inter):
        super().__init__()
        self.gate_proj = nn.Linear(d, inter, bias=False)
        self.up_proj = nn.Linear(d, inter, bias=False)
        self.down_proj = nn.Linear(inter, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen2Block(SparseMoeBlock):
    """The shared expert is weighted per token by a sigmoid, beside the routed ones."""

    def __init__(self):
        super().__init__(num_experts=6, norm=False)
        self.experts = nn.ModuleList([Qwen2MLP(32, 24) for _ in range(6)])
        self.shared_expert = Qwen2MLP(32, 64)
        self.shared_expert_gate = nn.Linear(32, 1, bias=False)

    def forward(self, hidden_states):
        routed, router_logits = super().forward(hidden_states)
        shared = self.shared_expert(hidden_states)
        shared = torch.sigmoid(self.shared_expert_gate(hidden_states)) * shared
        return routed + shared, router_logits


@case(seq(32), experts=6)
def hit_qwen2_shared_gate():
    return Qwen2Block()
