"""Small recurrent steps, each by hand: forward(token (B, 1, D)..., states (B, ...)...) -> results (B, 1, ...), states.

Shape legend: B rows, D width of a token.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from moeopt.lower.onnx.export import to_onnx

D = 6


class Step(nn.Module):
    """``states``: the shapes of its states without rows, with the dtype where it is not float32."""

    tokens = ((D,),)
    states = ()
    results = 1

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.build()

    def begin(self, rows, length, seed=0):
        """Random tokens (rows, length, ...) and states (rows, ...)."""
        g = torch.Generator().manual_seed(seed)
        tokens = [torch.randn(rows, length, *shape, generator=g) for shape in self.tokens]
        return tokens, [torch.randn(rows, *shape, generator=g) for shape in self.states]

    def weight(self, *shape):
        return nn.Parameter(torch.randn(*shape) * 0.5)


@functools.cache
def _exported(kind):
    module = kind()
    tokens, states = module.begin(2, 1)
    free = [{0: torch.export.Dim.AUTO} for _ in (*tokens, *states)]
    with torch.no_grad():
        program = torch.export.export(module, (*tokens, *states), dynamic_shapes=(tuple(free),), strict=False)
    return module, to_onnx(program)


def step_of(kind):
    """A step, and an ``onnx_ir.Model`` of it with any number of rows, the caller's own."""
    module, model = _exported(kind)
    return module, model.clone()


class Linear(Step):
    """A linear recurrence between two projections."""

    states = ((4,),)

    def build(self):
        self.enter, self.leave, self.decay = nn.Linear(D, 4), nn.Linear(4, D), self.weight(4)

    def forward(self, *given):
        x, h = given
        h = torch.sigmoid(self.decay) * h + self.enter(x)[:, 0]
        return self.leave(h).unsqueeze(1), h


class ConvDelta(Step):
    """The window of a convolution, and a delta rule on what comes out of it."""

    heads, size, kernel = 2, 16, 4
    tokens = ((8,),)
    states = ((3 * 32, 4), (2, 16, 16))

    def build(self):
        wide = self.heads * self.size
        self.qkv, self.gates, self.leave = nn.Linear(8, 3 * wide), nn.Linear(8, 2 * self.heads), nn.Linear(wide, 8)
        self.filters = self.weight(3 * wide, self.kernel)

    def convolved(self, x, window):
        window = torch.cat([window[:, :, 1:], self.qkv(x).transpose(1, 2)], -1)
        return F.silu((window * self.filters).sum(-1)), window

    def delta(self, x, mixed, memory):
        q, k, v = mixed.reshape(-1, 3, self.heads, self.size).unbind(1)
        k = k / (k.square().sum(-1, keepdim=True) + 1e-3).sqrt()
        forget, beta = torch.sigmoid(self.gates(x)[:, 0]).chunk(2, -1)
        memory = memory * forget[:, :, None, None]
        error = (v - (memory * k[..., None]).sum(-2)) * beta[..., None]
        memory = memory + k[..., None] * error[:, :, None]
        return self.leave((memory * q[..., None]).sum(-2).flatten(1)).unsqueeze(1), memory

    def forward(self, *given):
        x, window, memory = given
        mixed, window = self.convolved(x, window)
        y, memory = self.delta(x, mixed, memory)
        return y, window, memory


class Lstm(Step):
    """Two states that read each other."""

    states = ((4,), (4,))

    def build(self):
        self.gates, self.back = nn.Linear(D, 16), nn.Linear(4, 16, bias=False)

    def forward(self, *given):
        x, h, c = given
        h, c = self.cell(x, h, c)
        return h.unsqueeze(1), h, c

    def cell(self, x, h, c):
        i, f, o, g = (self.gates(x)[:, 0] + self.back(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class TwoLstms(Lstm):
    """Two pairs of states that read each other, the pairs interleaved."""

    states = ((4,), (4,), (4,), (4,))

    def forward(self, *given):
        x, h, k, c, d = given
        h, c = self.cell(x, h, c)
        k, d = self.cell(x.flip(-1), k, d)
        return (h - k).unsqueeze(1), h, k, c, d


class TokenShift(Step):
    """The state is the last token, as it came."""

    states = ((1, D),)

    def build(self):
        self.leave, self.mix = nn.Linear(D, D), self.weight(D)

    def forward(self, *given):
        x, last = given
        return self.leave(x + self.mix * (last - x)), x


class OldState(Step):
    """The result is made of the state as it was before the token."""

    states = ((4,),)

    def build(self):
        self.enter, self.leave = nn.Linear(D, 4), nn.Linear(4, D)

    def forward(self, *given):
        x, h = given
        return self.leave(h).unsqueeze(1), torch.tanh(h + self.enter(x)[:, 0])


class StateItself(OldState):
    """The results are the state before and after, with no node between."""

    states = ((1, D),)
    results = 2

    def forward(self, *given):
        x, h = given
        after = torch.tanh(h + x)
        return h, after, after


class Independent(Step):
    """Two states that know nothing of each other, each with a result."""

    states = ((4,), (3,))
    results = 2

    def build(self):
        self.one, self.two = nn.Linear(D, 4), nn.Linear(D, 3)

    def forward(self, *given):
        x, h, k = given
        h = torch.tanh(h + self.one(x)[:, 0])
        k = torch.cos(k * self.two(x)[:, 0])
        return h.unsqueeze(1), k.unsqueeze(1), h, k


class Heads(Step):
    """Two states in batched matmuls over rows and heads together: that leading size is not the number of rows."""

    states = ((2, 3, 3), (2, 3))

    def build(self):
        self.enter, self.leave = nn.Linear(D, 18), nn.Linear(6, D)

    def forward(self, *given):
        x, memory, norm = given
        q, k, v = self.enter(x).reshape(-1, 3, 2, 3).unbind(1)
        k, v, q = torch.sigmoid(k.reshape(-1, 3, 1)), v.reshape(-1, 1, 3), q.reshape(-1, 1, 3)
        flat = 0.5 * memory.reshape(-1, 3, 3) + torch.bmm(k, v)
        past = 0.5 * norm.reshape(-1, 3, 1) + k
        y = torch.bmm(q, flat) / (1 + torch.bmm(q, past).abs())
        return (
            self.leave(y.reshape(x.shape[0], 1, 6)),
            flat.reshape(x.shape[0], 2, 3, 3),
            past.reshape(x.shape[0], 2, 3),
        )


class Zeros(Step):
    """Zeros for each row, of a number of rows that the step reads from its token."""

    states = ((4,),)

    def build(self):
        self.enter, self.leave = nn.Linear(D, 2), nn.Linear(8, D)

    def forward(self, *given):
        x, h = given
        h = 0.7 * h + torch.cat([self.enter(x)[:, 0], torch.zeros(x.shape[0], 2)], -1)
        y = torch.cat([torch.zeros(x.shape[0], 1, 4) + torch.cos(x[..., :4]), h.unsqueeze(1)], -1)
        return self.leave(y), h


class OneRow(Step):
    """Constants with one row: as they are, computed, and repeated for each row."""

    states = ((4,),)

    def build(self):
        self.enter, self.bias, self.begin_with = nn.Linear(D, 4), self.weight(1, 4), self.weight(1, 1, 4)

    def forward(self, *given):
        x, h = given
        h = torch.sigmoid(self.bias) * h + self.enter(x)[:, 0] + self.bias
        return torch.cat([self.begin_with.expand(x.shape[0], 1, 4).tanh(), h.unsqueeze(1)], -1), h


class Stateless(Step):
    """A result that no state reaches, beside one that it does."""

    states = ((4,),)
    results = 2

    def build(self):
        self.enter, self.leave = nn.Linear(D, 4), nn.Linear(D, 3)

    def forward(self, *given):
        x, h = given
        h = torch.tanh(h - self.enter(x)[:, 0])
        return self.leave(torch.tanh(x)), h.unsqueeze(1), h


class Counter(Step):
    """A whole number counts the tokens, another state forgets everything, a third is handed on; two token inputs."""

    tokens = ((D,), (1,))
    states = ((1,), (D,), (D,))

    def build(self):
        self.leave = nn.Linear(D, D)

    def begin(self, rows, length, seed=0):
        tokens, (_, *rest) = super().begin(rows, length, seed)
        return tokens, [torch.arange(rows)[:, None], *rest]

    def forward(self, *given):
        x, gate, count, gone, same = given
        y = self.leave(x / (count + 1).to(x.dtype).unsqueeze(1)) * gate + (gone + same).unsqueeze(1)
        return y, count + 1, torch.zeros_like(gone), same


class Mamba(Step):
    """Mamba 1: what a state decays by is as wide as the state."""

    wide, inner = 16, 8
    tokens = ((8,),)
    states = ((16, 8),)

    def build(self):
        self.enter, self.about, self.leave = nn.Linear(8, 16), nn.Linear(16, 2 * 8), nn.Linear(16, 8)
        self.pace, self.log = nn.Linear(16, 16), self.weight(16, 8)

    def forward(self, *given):
        x, h = given
        u = F.silu(self.enter(x)[:, 0])
        into, out = self.about(u).chunk(2, -1)
        pace = F.softplus(self.pace(u))
        h = torch.exp(-pace[..., None] * torch.exp(self.log)) * h + (pace * u)[..., None] * into[:, None]
        return self.leave((h * out[:, None]).sum(-1)).unsqueeze(1), h


class Together(Step):
    """Steps side by side that read the same tokens: what the exporter costs is mostly the same for one step or many."""

    def build(self):
        self.steps = nn.ModuleList(kind() for kind in self.kinds)
        self.tokens = max((step.tokens for step in self.steps), key=len)
        self.results = sum(step.results for step in self.steps)

    def begin(self, rows, length, seed=0):
        states = [state for step in self.steps for state in step.begin(rows, length, seed)[1]]
        return max((step.begin(rows, length, seed)[0] for step in self.steps), key=len), states

    def forward(self, *given):
        tokens, states = given[: len(self.tokens)], given[len(self.tokens) :]
        results, nexts = [], []
        for step in self.steps:
            mine, states = states[: len(step.states)], states[len(step.states) :]
            ends = step(*tokens[: len(step.tokens)], *mine)
            results += ends[: step.results]
            nexts += ends[step.results :]
        return *results, *nexts


class Small(Together):
    kinds = (Linear, TokenShift, OldState, StateItself, Independent, Zeros, OneRow, Stateless, Counter)


class Crossed(Together):
    kinds = (Lstm, TwoLstms)


STEPS = {kind.__name__: kind for kind in (Small, Crossed, ConvDelta, Heads, Mamba)}
