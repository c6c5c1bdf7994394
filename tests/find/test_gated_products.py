"""Mixtures of one matrix each that a gate weighs, in the ways they are written: one entry with the reason; and what
looks like one, and is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from tests.onnx_in.by_hand import File, H

D, N = 16, 4
X = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1))


class Mixture(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.gate, self.w = nn.Linear(D, N), nn.Parameter(torch.randn(N, D, D))
        self.each = nn.ParameterList(nn.Parameter(torch.randn(D, D)) for _ in range(N))
        self.cubes, self.wide = nn.Parameter(torch.randn(N, D, D, 3)), nn.Linear(D, N * D)
        self.form = form

    def forward(self, x):
        return self.form(self, x, self.gate(x))


def chosen(scores):
    values, ids = scores.softmax(-1).topk(2)
    return torch.zeros_like(scores).scatter(-1, ids, values)


def shares(scores):
    values, ids = scores.topk(2)
    return torch.zeros_like(scores).scatter(-1, ids, values.softmax(-1))


def weighed(weights, x, matrices):
    return sum(weights[..., e, None] * (x @ matrices[e]) for e in range(N))


def heads(mixture, x):
    parts = mixture.wide(x).unflatten(-1, (N, D)).transpose(1, 2)
    return F.scaled_dot_product_attention(parts, parts, parts)


def powers(x):
    return torch.stack([x, x.sin(), x.cos()], -1)


ONE_MATRIX = "its experts are one matrix each, and every row passes all of them, weighed by a gate"
ONE_STACK = "its experts are matrices of one stack (w), and one product multiplies every row by all of them"
FORMS = {
    "one einsum": (lambda s, x, g: torch.einsum("bse,bsd,edo->bso", g.softmax(-1), x, s.w), ONE_MATRIX),
    "one einsum, chosen": (lambda s, x, g: torch.einsum("bse,bsd,edo->bso", chosen(g), x, s.w), ONE_STACK),
    "weighed last": (lambda s, x, g: torch.einsum("bsd,edo,bse->bso", x, s.w, chosen(g)), ONE_STACK),
    "cubes": (
        lambda s, x, g: (torch.einsum("bsip,eiop->bseo", powers(x), s.cubes) * chosen(g)[..., None]).sum(-2),
        ONE_MATRIX,
    ),
    "parts of one layer": (
        lambda s, x, g: (g.softmax(-1)[..., None] * s.wide(x).view(*x.shape[:-1], N, D)).sum(-2),
        "its experts are 4 parts of one product (wide.weight), and a gate weighs their results",
    ),
    "shares of the chosen": (
        lambda s, x, g: weighed(shares(g), x, s.each),
        "backend='onnxruntime' takes it",
    ),
}


def entries(form):
    torch.manual_seed(0)
    return moeopt.explain(Mixture(form).eval(), X).blocks


@pytest.mark.parametrize("what", FORMS)
def test_one_entry_says_why_it_stays(what):
    form, words = FORMS[what]
    (entry,) = entries(form)
    assert (entry.kind, entry.status, entry.experts) == ("moe", "declined", N)
    assert words in entry.reason, entry.reason


OTHERS = {
    "gates of channels": lambda s, x, g: (x @ s.each[0])[..., :N] * g.softmax(-1),
    "one head that attends": lambda s, x, g: F.scaled_dot_product_attention(x @ s.each[0], x @ s.each[1], s.wide(x)),
    "gates of a kernel's channels": lambda s, x, g: (
        F.conv2d(x.reshape(8, 1, 4, 8), s.cubes[:, :1, :3])
        * g.mean(1).softmax(-1).repeat_interleave(4, 0)[:, :, None, None]
    ),
    "gates of heads": lambda s, x, g: torch.einsum("bhsd,hdo->bso", heads(s, x) * g.sigmoid().mT[..., None], s.w),
    "shares of heads": lambda s, x, g: torch.einsum("bhsd,hdo->bso", heads(s, x) * g.softmax(-1).mT[..., None], s.w),
    "shares of groups of features": lambda s, x, g: (g.softmax(-1)[..., None] * s.wide(x).unflatten(-1, (N, D))).tanh(),
    "gates of a sequence's channels": lambda s, x, g: F.conv1d(x.mT, s.w, padding=8) * g.mean(1).sigmoid()[..., None],
    "shares of kernels for each channel": lambda s, x, g: (
        torch.stack([F.conv1d(x.mT, kernel[:2, :, None]) for kernel in s.each[:2]], 1)
        * g.mean(1).view(-1, 2, 2).softmax(1)[..., None]
    ).sum(1),
    "one blend for all rows": lambda s, x, g: weighed(s.each[0][0, :N].softmax(-1), x, s.w),
    "a stack without a gate": lambda s, x, g: torch.einsum("bsd,edo->bso", x, s.w),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_mixture_has_no_entry(what):
    assert entries(OTHERS[what]) == ()


def test_keys_of_several_heads_that_rows_are_compared_with_are_no_experts():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.keys = nn.Linear(D, D), nn.Parameter(torch.randn(4, N, 4))
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, D)) for _ in range(N))

        def forward(self, x):
            rows = x.flatten(0, 1)
            scores = torch.einsum("thd,hnd->thn", self.query(rows).view(-1, 4, 4), self.keys)
            weights, ids = scores.softmax(-1).mean(1).topk(2)
            total = torch.zeros_like(rows)
            for number, expert in enumerate(self.experts):
                row, slot = torch.where(ids == number)
                total = total.index_add(0, row, expert(rows[row]) * weights[row, slot, None])
            return total.view_as(x)

    torch.manual_seed(0)
    (entry,) = moeopt.explain(Router().eval(), X).blocks
    assert (entry.status, entry.experts) == ("rewritten", N)


PARTS = {
    "Gemm": lambda file, x: file.node("Gemm", x, file.weight(6, H), file.weight(6), transB=1),
    "Mul, Add": lambda file, x: file.node("Add", file.node("Mul", x, file.weight(H)), file.weight(H)),
}


@pytest.mark.parametrize("operators", PARTS)
def test_experts_of_a_file_as_a_module_have_an_entry(operators):
    """No list holds them, and numbers of names count weights."""
    pytest.importorskip("onnx")
    file = File()
    module = moeopt.from_onnx(file.model(file.dense(lambda x, e: PARTS[operators](file, x))))
    (entry,) = moeopt.explain(module, torch.randn(5, H)).blocks
    assert (entry.kind, entry.status, entry.experts) == ("moe", "declined", 4)
    assert "backend='onnxruntime' takes it" in entry.reason


class Heads(nn.Module):
    """A matrix of each head for each expert; a token's choice is one for all heads."""

    def __init__(self, by_rows):
        super().__init__()
        self.gate, self.w, self.by_rows = nn.Linear(D, N), nn.Parameter(torch.randn(4, N, 4, 4)), by_rows

    def forward(self, x):
        rows = x.flatten(0, 1)
        weight, ids = self.gate(rows).softmax(-1).max(-1)
        heads = rows.view(-1, 4, 4)
        if not self.by_rows:
            own = self.w[:, ids].transpose(0, 1)
            return ((heads[..., None, :] @ own).flatten(1) * weight[:, None]).view_as(x)
        total = torch.zeros_like(rows)
        for number in range(N):
            row = torch.where(ids == number)[0]
            result = torch.einsum("thi,hio->tho", rows[row].view(-1, 4, 4), self.w[:, number]).flatten(1)
            total = total.index_add(0, row, result * weight[row, None])
        return total.view_as(x)


def test_matrices_of_heads_that_are_looked_up_and_the_way_out():
    torch.manual_seed(0)
    model = Heads(False).eval()
    (entry,) = moeopt.explain(model, X).blocks
    assert entry.reason.startswith(
        "its experts are one matrix each for every part of a row (a head), and each token multiplies by a copy of its "
        "own (w[ids]); the op takes such experts, in engines, where each runs on the rows that chose it: loop over"
    )
    model.by_rows = True
    fast = moeopt.optimize(model, X, backend="onnxruntime", verify="fast")
    assert [b.status for b in fast.report.blocks] == ["rewritten"]
    torch.testing.assert_close(fast(X), Heads.forward(model, X), rtol=1e-5, atol=1e-5)
