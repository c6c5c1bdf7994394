"""What stands around the experts: shared experts, scales, aux outputs, state, dtypes, odd call sites."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, made_by, seq


class Expert(nn.Module):
    def __init__(self, dim, inner, bias=False):
        super().__init__()
        self.w1 = nn.Linear(dim, inner, bias=bias)
        self.w2 = nn.Linear(inner, dim, bias=bias)
        self.w3 = nn.Linear(dim, inner, bias=bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """The plain one that the rest of this file varies."""

    def __init__(self, dim=20, inner=28, n=4, k=2):
        super().__init__()
        self.n, self.k = n, k
        self.gate = nn.Linear(dim, n, bias=False)
        self.experts = nn.ModuleList(Expert(dim, inner) for _ in range(n))

    def route(self, x):
        logits = self.gate(x)
        w, idx = torch.topk(F.softmax(logits.float(), dim=-1), self.k)
        return logits, (w / w.sum(-1, keepdim=True)).to(x.dtype), idx

    def apply_experts(self, x, w, idx):
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            batch_idx, nth = torch.where(idx == i)
            if batch_idx.numel():
                y[batch_idx] += w[batch_idx, nth, None] * expert(x[batch_idx])
        return y

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        _, w, idx = self.route(h)
        return self.apply_experts(h, w, idx).view_as(x)


class SharedAdded(MoE):
    def __init__(self):
        super().__init__()
        self.shared = Expert(20, 56)

    def forward(self, x):
        return super().forward(x) + self.shared(x)


@case(seq(20), experts=4)
def around_shared_added():
    return SharedAdded()


class SharedMean(SharedAdded):
    """Snowflake-like mean of both, then an output scale and a learned output bias."""

    def __init__(self):
        super().__init__()
        self.out_bias = nn.Parameter(torch.randn(20))

    def forward(self, x):
        return super().forward(x) / 2 * 1.7 + self.out_bias


@case(seq(20), experts=4)
def around_shared_mean_scale_bias():
    return SharedMean()


class Latent(MoE):
    """Experts work in a narrower space: projections before and after, router on the full one."""

    def __init__(self):
        super().__init__(dim=12)
        self.gate, self.down, self.up = nn.Linear(20, 4), nn.Linear(20, 12, bias=False), nn.Linear(12, 20, bias=False)

    def forward(self, x):
        h = x.flatten(0, 1)
        _, w, idx = self.route(h)
        return self.up(self.apply_experts(self.down(h), w, idx)).view_as(x)


@case(seq(20), experts=4)
def around_latent_projections():
    return Latent()


class LoadBalanced(MoE):
    """Returns (y, aux loss, router logits); the loss is computed in eval as well."""

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        logits, w, idx = self.route(h)
        load = F.one_hot(idx, self.n).float().mean((0, 1))
        aux = self.n * (load * logits.softmax(-1).mean(0)).sum()
        z = torch.logsumexp(logits, -1).square().mean()
        return self.apply_experts(h, w, idx).view_as(x), aux + 1e-3 * z, logits


@case(seq(20), experts=4)
def around_aux_tuple():
    return LoadBalanced()


@dataclass
class MoEOutput:
    hidden: torch.Tensor
    router_logits: torch.Tensor
    loss: torch.Tensor | None = None
    name: str = "moe"


class DataclassOut(MoE):
    def forward(self, x, return_dict=False):
        h = x.view(-1, x.shape[-1])
        logits, w, idx = self.route(h)
        y = self.apply_experts(h, w, idx).view_as(x)
        if return_dict:
            return {"y": y, "extras": {"ids": idx, "weights": [w, logits]}, "k": self.k}
        return MoEOutput(y, logits)


@case(seq(20), experts=4)
def around_dataclass_output():
    return DataclassOut()


@case(made_by(lambda s, g: ((torch.randn(*s, 20, generator=g),), {"return_dict": True})), experts=4)
def around_dict_output():
    return DataclassOut()


class KeepsLoss(MoE):
    """Leaves its loss on self for the trainer to pick up."""

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        logits, w, idx = self.route(h)
        self.aux_loss = logits.softmax(-1).mean(0).square().sum() * self.n
        self.last_ids = idx
        return self.apply_experts(h, w, idx).view_as(x)


class CollectsLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([KeepsLoss(), KeepsLoss()])

    def forward(self, x):
        for b in self.blocks:
            x = x + b(x)
        return x, sum(m.aux_loss for m in self.modules() if isinstance(m, KeepsLoss)), self.blocks[1].last_ids


@case(seq(20), experts=4, moe=2)
def around_aux_loss_attribute():
    return CollectsLosses()


class Counting(MoE):
    """Counts tokens per expert in a buffer at every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(4, dtype=torch.long))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        _, w, idx = self.route(h)
        self.tokens_per_expert += torch.bincount(idx.flatten(), minlength=self.n)
        self.calls.add_(1)
        return self.apply_experts(h, w, idx).view_as(x)


@case(seq(20), experts=4, check_state=("tokens_per_expert", "calls"))
def around_counters():
    return Counting()


class Wrapped(nn.Module):
    """The MoE is called with keyword arguments only, and with some it ignores."""

    class Inner(MoE):
        def forward(self, *, hidden, scale=1.0, mask=None, **unused):
            h = hidden.reshape(-1, hidden.shape[-1])
            _, w, idx = self.route(h)
            y = self.apply_experts(h, w, idx).view_as(hidden) * scale
            return y if mask is None else y * mask.unsqueeze(-1)

    def __init__(self):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(20), self.Inner()

    def forward(self, x, mask=None):
        return x + self.moe(hidden=self.norm(x), scale=0.5, mask=mask, layer_idx=3)


@case(
    made_by(lambda s, g: ((torch.randn(*s, 20, generator=g),), {"mask": (torch.rand(*s, generator=g) > 0.3).float()})),
    experts=4,
)
def around_keyword_call():
    return Wrapped()


class Twice(nn.Module):
    """ALBERT-like: one MoE module, used by two layers of the forward."""

    def __init__(self):
        super().__init__()
        self.moe = MoE()
        self.norms = nn.ModuleList([nn.LayerNorm(20), nn.LayerNorm(20)])

    def forward(self, x):
        for norm in self.norms:
            x = x + self.moe(norm(x))
        return x


@case(seq(20), experts=4, moe=2)
def around_module_used_twice():
    return Twice()


class TiedExperts(MoE):
    """Experts 0 and 3 are the same module; 1 and 2 share W_out."""

    def __init__(self):
        super().__init__()
        self.experts[3] = self.experts[0]
        self.experts[2].w2.weight = self.experts[1].w2.weight


@case(seq(20), experts=4)
def around_tied_experts():
    return TiedExperts()


class TiedAcrossLayers(nn.Module):
    """Both layers own a router of their own and use the same list of experts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = MoE(), MoE()
        self.b.experts = self.a.experts

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) * 4))


@case(seq(20), experts=4, moe=2)
def around_experts_shared_by_layers():
    return TiedAcrossLayers()


class DropoutExperts(MoE):
    """Dropout modules everywhere, silent in eval."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 28), nn.GELU(), nn.Dropout(0.3), nn.Linear(28, 20), nn.Dropout(0.2))
            for _ in range(4)
        )


@case(seq(20), experts=4)
def around_dropout_in_eval():
    return DropoutExperts()


class EmptySafe(MoE):
    """Early return for nothing to do, a padding mask that empties tokens, an in-place residual."""

    def forward(self, x, padding=None):
        if x.numel() == 0:
            return x
        h = x.reshape(-1, x.shape[-1])
        keep = torch.ones(len(h), dtype=torch.bool) if padding is None else ~padding.flatten()
        out = h.clone()
        _, w, idx = self.route(h[keep])
        out[keep] += self.apply_experts(h[keep], w, idx)
        return out.view_as(x)


@case(seq(20), experts=4)
def around_early_return():
    return EmptySafe()


@case(made_by(lambda s, g: ((torch.randn(*s, 20, generator=g), torch.rand(*s, generator=g) > 0.6), {})), experts=4)
def around_padding_mask():
    return EmptySafe()


class NoGradInside(MoE):
    """Decorated forward, hidden state scaled by a config constant, a .detach() on the way."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x.detach() * 0.5) * 2


@case(seq(20), experts=4)
def around_no_grad_forward():
    return NoGradInside()


class HalfModel(MoE):
    """bfloat16 weights; the router runs in float32 on an upcast copy."""

    def __init__(self, dtype):
        super().__init__()
        self.to(dtype)
        self.gate = nn.Linear(20, 4, bias=False)

    def route(self, x):
        logits = self.gate(x.float())
        w, idx = logits.softmax(-1).topk(self.k)
        return logits, (w / w.sum(-1, keepdim=True)).to(x.dtype), idx


@case(seq(20, torch.bfloat16), experts=4)
def dtype_bfloat16_float32_router():
    return HalfModel(torch.bfloat16)


@case(seq(20, torch.float16), experts=4)
def dtype_float16():
    return HalfModel(torch.float16)


class AllBFloat16(MoE):
    """Weights stay float32 in the product, the sum too; cast at the end."""

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        w, idx = self.gate(h).float().softmax(-1).topk(self.k)
        y = torch.zeros(h.shape, dtype=torch.float32)
        for i in range(self.n):
            r, c = torch.where(idx == i)
            y.index_add_(0, r, self.experts[i](h[r]) * w[r, c, None])
        return y.to(x.dtype).view_as(x)


@case(seq(20, torch.bfloat16), experts=4)
def dtype_bfloat16_float32_accumulator():
    return AllBFloat16().to(torch.bfloat16)


class Float32Gemms(MoE):
    """A bfloat16 model whose experts compute in float32."""

    def apply_experts(self, x, w, idx):
        y = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            r, c = torch.where(idx == i)
            h = F.silu(x[r].float() @ e.w1.weight.float().t()) * (x[r].float() @ e.w3.weight.float().t())
            y.index_add_(0, r, ((h @ e.w2.weight.float().t()) * w[r, c, None]).to(y.dtype))
        return y


@case(seq(20, torch.bfloat16), experts=4)
def dtype_experts_compute_in_float32():
    return Float32Gemms().to(torch.bfloat16)


@case(flat(20, torch.float64), experts=4)
def dtype_float64():
    return MoE().double()
