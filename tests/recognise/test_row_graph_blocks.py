"""Experts of block-diagonal matrices, of products written over several dimensions, and of parts of a row."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt

D, N = 16, 4


class Monarch(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ParameterList(nn.Parameter(torch.randn(4, 4, 4)) for _ in range(4))

    def forward(self, x):
        for number, w in enumerate(self.blocks):
            x = torch.einsum("tbi,bio->tbo", x.view(-1, 4, 4), w).transpose(1, 2).reshape(-1, D)
            x = F.silu(x) if number == 1 else x
        return x


class Butterfly(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(8, 2, 2)), nn.Linear(D, D)

    def forward(self, x):
        z = torch.einsum("tgah,ghba->tgbh", x.view(-1, 2, 2, 4), self.w.view(2, 4, 2, 2))
        return self.out(F.gelu(z.reshape(-1, D)))


class Chebyshev(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(D, D, 4) * 0.1)
        self.register_buffer("degrees", torch.arange(4))

    def forward(self, x):
        powers = torch.cos(torch.acos(torch.tanh(x) * 0.99)[..., None] * self.degrees)
        return torch.einsum("tid,iod->to", powers, self.c)


class CountsAtEachCall(Chebyshev):
    def forward(self, x):
        powers = torch.cos(torch.acos(torch.tanh(x) * 0.99)[..., None] * torch.arange(4))
        return torch.einsum("tid,iod->to", powers, self.c)


class BlockProducts(nn.Module):
    """The turned rows meet element-wise calls and numbers before they are turned back."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(4, 4, 4)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(4, 1, 4))

    def forward(self, x):
        z = x.view(-1, 4, 4).transpose(0, 1)
        z = torch.tanh(torch.baddbmm(self.bias, z, self.a) * 0.5) + z
        return (torch.matmul(z, self.b) + self.bias[:1]).transpose(0, 1).reshape(-1, D)


class AttendsWithin(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(D, D)

    def forward(self, x):
        parts = x.view(-1, 4, 4)
        score = self.q(parts) @ self.k(parts).transpose(1, 2) * 0.5
        return self.out((score.softmax(-1) @ self.v(parts)).reshape(-1, D))


class Moe(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, N), nn.ModuleList(make() for _ in range(N))

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            total.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return total.view(x.shape)


X = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1))


def made(make):
    torch.manual_seed(0)
    return Moe(make).eval()


@pytest.mark.parametrize("make", [Monarch, Butterfly, CountsAtEachCall, BlockProducts, AttendsWithin])
def test_an_engine_takes_them_at_any_number_of_rows(make):
    model = made(make)
    fast = moeopt.optimize(model, X, backend="onnxruntime", verify="fast")
    (entry,) = fast.report.blocks
    assert (entry.name, entry.status, entry.experts) == ("Moe", "rewritten", N), entry.reason
    for x in (X, X[:1, :1], X.repeat(1, 2, 1)):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


class AcrossRows(nn.Module):
    """The blocks are of rows, not of a row's features."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, D, D))

    def forward(self, x):
        even = x[: len(x) // 2 * 2].view(2, -1, D)
        return F.pad(torch.bmm(torch.tanh(even), self.w).view(-1, D), (0, 0, 0, len(x) % 2))


class Gathered(nn.Module):
    """Rows are added up where they stand behind the blocks."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, 4))

    def forward(self, x):
        z = torch.bmm(x.view(-1, 4, 4).transpose(0, 1), self.w)
        return (z - z.mean(1, keepdim=True)).transpose(0, 1).reshape(-1, D)


@pytest.mark.parametrize("make", [AcrossRows, Gathered])
def test_experts_that_mix_rows_so_are_declined(make):
    entries = moeopt.explain(made(make), X).blocks
    assert entries and all(e.status == "declined" for e in entries)


class PartsAreSequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.GRU(4, 4, batch_first=True), nn.Linear(D, D)

    def forward(self, x):
        return self.out(self.layer(x.view(-1, 4, 4))[0].reshape(-1, D))


class PartsAttend(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(D, D)

    def forward(self, x):
        parts = x.view(-1, 4, 4)
        return self.out(self.layer(parts, parts, parts, need_weights=False)[0].reshape(-1, D))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (PartsAreSequences, "(GRU at experts.0.layer): each token's row is a sequence of its own there"),
        (PartsAttend, "its experts attend (scaled_dot_product_attention) among parts of each token's own row"),
    ],
)
def test_what_happens_within_a_row_is_not_said_of_tokens(make, words):
    (entry,) = moeopt.explain(made(make), X).blocks
    assert words in entry.reason and "tokens before" not in entry.reason


class Inverted(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.down(torch.linalg.inv(self.up(x).view(-1, 4, 4)).reshape(-1, D))


def test_the_call_without_a_rule_is_named_where_nothing_else_is():
    (entry,) = moeopt.explain(made(Inverted), X).blocks
    assert entry.reason.startswith("an expert's linalg_inv_ex is not known to work on each row by itself")
    assert "test_row_graph_blocks.py" in entry.source
