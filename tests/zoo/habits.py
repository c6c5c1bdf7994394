"""Habits that surprise tracers: in-place inputs, checkpointing, hidden lists, buffers, memories."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.branches import Moe
from tests.zoo.case import case, flat, seq


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


@case(flat(16), experts=4, expect="declined", reason="weights are computed at each call")
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
