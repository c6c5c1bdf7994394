"""Forwards that take another path another time, and habits that surprise tracers: still never wrong."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import case, flat, made_by, seq


class SwiGLU(nn.Module):
    def __init__(self, d=20, f=24):
        super().__init__()
        self.wi, self.wo = nn.Linear(d, 2 * f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x):
        a, b = self.wi(x).chunk(2, -1)
        return self.wo(F.silu(a) * b)


class Moe(nn.Module):
    def __init__(self, d=20, n=4, k=2):
        super().__init__()
        self.n, self.k = n, k
        self.gate = nn.Linear(d, n, bias=False)
        self.experts = nn.ModuleList([SwiGLU(d) for _ in range(n)])

    def route(self, x):
        w, ids = self.gate(x).softmax(-1).topk(self.k)
        return w / w.sum(-1, keepdim=True), ids

    def loop(self, x, w, ids):
        y = torch.zeros_like(x)
        for e in range(self.n):
            t, s = torch.where(ids == e)
            if t.numel():
                y.index_add_(0, t, self.experts[e](x[t]) * w[t, s, None])
        return y

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        return self.loop(h, *self.route(h)).view_as(x)


class PrefillOrDecode(Moe):
    """One position at a time takes the gathered path; longer inputs take the loop."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.route(h)
        if x.shape[1] > 1:
            return self.loop(h, w, ids).view_as(x)
        wi = torch.stack([e.wi.weight for e in self.experts])[ids]
        wo = torch.stack([e.wo.weight for e in self.experts])[ids]
        a, b = torch.einsum("tkoh,th->tko", wi, h).chunk(2, -1)
        return torch.einsum("tkho,tko,tk->th", wo, F.silu(a) * b, w).view_as(x)


@case(seq(20), experts=4, expect="either")
def branch_prefill_or_decode():
    return PrefillOrDecode()


class SmallBatchScale(Moe):
    """A different function for short inputs: whoever generalises from one length is wrong."""

    def forward(self, x):
        y = super().forward(x)
        return y * 0.5 if x.shape[0] * x.shape[1] < 5 else y


@case(seq(20), experts=4, expect="either")
def branch_short_inputs_are_scaled():
    return SmallBatchScale()


class OptionalMask(Moe):
    """The example has no mask; later calls do."""

    def forward(self, x, mask=None, output_router_logits=False):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.route(h)
        if mask is not None:
            w = w * mask.reshape(-1, 1)
        y = self.loop(h, w, ids).view_as(x)
        return (y, self.gate(h)) if output_router_logits else y


def later_with_mask(i):
    shape = [(2, 6), (2, 6), (1, 3), (2, 6), (3, 5)][i % 5]
    g = torch.Generator().manual_seed(i)
    x, mask = torch.randn(*shape, 20, generator=g), (torch.rand(shape, generator=g) > 0.4).float()
    return (x,), [{}, {"mask": mask}, {}, {"output_router_logits": True}, {"mask": mask}][i % 5]


@case(later_with_mask, experts=4, expect="either")
def branch_mask_and_flag_appear_later():
    return OptionalMask()


class ScalarArgument(Moe):
    """A plain float argument that differs from call to call."""

    def forward(self, x, temperature=1.0):
        h = x.reshape(-1, x.shape[-1])
        w, ids = (self.gate(h) / temperature).softmax(-1).topk(self.k)
        return self.loop(h, w, ids).view_as(x)


@case(
    made_by(
        lambda s, g: ((torch.randn(*s, 20, generator=g),), {"temperature": 0.5 + torch.rand((), generator=g).item()})
    ),
    experts=4,
    expect="either",
)
def branch_float_argument():
    return ScalarArgument()


class KeptExperts(Moe):
    """The caller says how many experts to use, a plain integer."""

    def forward(self, x, top_k=2):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.gate(h).softmax(-1).topk(top_k)
        return self.loop(h, w, ids).view_as(x)


@case(made_by(lambda s, g: ((torch.randn(*s, 20, generator=g),), {"top_k": 1 + s[0] % 3})), experts=4, expect="either")
def branch_top_k_argument():
    return KeptExperts()


class WritesItsInput(Moe):
    """Scales the caller's tensor in place before anything else."""

    def forward(self, x):
        x.mul_(0.5)
        h = x.view(-1, x.shape[-1])
        return self.loop(h, *self.route(h)).view_as(x)


@case(seq(20), experts=4, expect="either")
def branch_writes_its_input():
    return WritesItsInput()


class AddsIntoItsInput(Moe):
    """Accumulates the experts' result into the caller's tensor and returns that same tensor."""

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        w, ids = self.route(h)
        clean = h.clone()
        for e in range(self.n):
            t, s = torch.where(ids == e)
            h.index_add_(0, t, self.experts[e](clean[t]) * w[t, s, None])
        return x


@case(seq(20), experts=4, expect="either")
def branch_accumulates_into_its_input():
    return AddsIntoItsInput()


class Checkpointed(Moe):
    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        w, ids = self.route(h)
        return checkpoint(self.loop, h, w, ids, use_reentrant=False).view_as(x)


@case(seq(20), experts=4, expect="either")
def branch_checkpointed():
    return Checkpointed()


class AutocastOff(Moe):
    """The router leaves autocast, as Switch-like code does."""

    def route(self, x):
        with torch.autocast(device_type=x.device.type, enabled=False):
            w, ids = F.softmax(F.linear(x.float(), self.gate.weight.float()), dim=-1).topk(self.k)
        return w.type_as(x), ids


@case(seq(20), experts=4)
def branch_router_leaves_autocast():
    return AutocastOff()


class PlainList(Moe):
    """The experts hide in a plain Python list: no parameters, no state_dict entries."""

    def __init__(self):
        super().__init__()
        hidden = list(self.experts)
        del self.experts
        self.experts = hidden


@case(seq(20), experts=4, expect="either", moe=None)
def branch_unregistered_experts():
    return PlainList()


class FrozenBuffers(nn.Module):
    """Inference-only weights, registered as buffers."""

    def __init__(self, d=16, f=20, n=4):
        super().__init__()
        self.register_buffer("router", torch.randn(d, n))
        self.register_buffer("up", torch.randn(n, d, f) * 0.3)
        self.register_buffer("down", torch.randn(n, f, d) * 0.3)

    def forward(self, x):
        w, ids = (x @ self.router).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            t, s = torch.where(ids == e)
            y.index_add_(0, t, (F.relu(x[t] @ up) @ down) * w[t, s, None])
        return y


@case(flat(16), experts=4, expect="either")
def branch_weights_are_buffers():
    return FrozenBuffers()


class ComputedWeights(FrozenBuffers):
    """Weights are made in forward: a low-rank product per expert."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 16, 6) * 0.4)
        self.b = nn.Parameter(torch.randn(4, 6, 20) * 0.4)

    def forward(self, x):
        self.up = self.a @ self.b
        return super().forward(x)


@case(flat(16), experts=4, expect="either", moe=None)
def branch_weights_computed_in_forward():
    return ComputedWeights()


class ReloadsTopK(Moe):
    """Reads k from a buffer with ``.item()``: a value from off the tape that does not depend on the input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k_now", torch.tensor(2))

    def route(self, x):
        w, ids = self.gate(x).softmax(-1).topk(int(self.k_now.item()))
        return w, ids


@case(seq(20), experts=4, expect="either")
def branch_top_k_in_a_buffer():
    return ReloadsTopK()


class Cached(Moe):
    """Remembers its last input and mixes it into the next call's router."""

    last = None

    def route(self, x):
        logits = self.gate(x)
        if self.last is not None:
            logits = logits + self.last
        self.last = logits.mean(0, keepdim=True)
        w, ids = logits.softmax(-1).topk(self.k)
        return w, ids


@case(seq(20), experts=4, expect="declined", reason="(?i)state|call|differ|attribute|determin|twice|keeps|remember")
def declined_remembers_the_last_call():
    return Cached()


class PaddedToEight(Moe):
    """Tokens are padded to a multiple of eight, and the padding is cut off again."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        n = h.shape[0]
        h = F.pad(h, (0, 0, 0, -n % 8))
        return self.loop(h, *self.route(h))[:n].view_as(x)


@case(seq(20), experts=4)
def branch_padded_to_eight():
    return PaddedToEight()


class Chunked(Moe):
    """Tokens go through in chunks of four to save memory: one MoE module, many small loops."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        return torch.cat([self.loop(c, *self.route(c)) for c in h.split(4)]).view_as(x)


@case(seq(20), experts=4, expect="either", moe=None)
def branch_chunked_tokens():
    return Chunked()


class SequenceFirst(Moe):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@case(seq(20), experts=4)
def branch_sequence_first():
    return SequenceFirst()


def one_token_first(i):
    shape = [(1, 1), (2, 6), (1, 2), (4, 5), (1, 1)][i % 5]
    return (torch.randn(*shape, 20, generator=torch.Generator().manual_seed(70 + i)),), {}


@case(one_token_first, experts=8)
def branch_example_of_one_token():
    return Moe(n=8)


def ties(i):
    shape = [(2, 6), (1, 3), (2, 2), (1, 9)][i % 4]
    x = torch.randn(*shape, 20, generator=torch.Generator().manual_seed(i))
    return (x.round() if i % 2 else torch.zeros_like(x) if i else x,), {}


@case(ties, experts=4)
def branch_zeros_and_ties():
    return Moe()


def no_tokens(i):
    shape = [(2, 6), (0, 6), (2, 0), (1, 3)][i % 4]
    return (torch.randn(*shape, 20, generator=torch.Generator().manual_seed(i)),), {}


@case(no_tokens, experts=4)
def branch_no_tokens_at_all():
    return Moe()


def strided(i):
    g = torch.Generator().manual_seed(i)
    x = torch.randn(20, 3 + i, 2, generator=g).permute(2, 1, 0)
    return (x[:, ::2] if i % 2 else x,), {}


@case(strided, experts=4)
def branch_strided_inputs():
    return Moe()
