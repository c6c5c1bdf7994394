"""Products whose results choose, however they choose; those of activations, norms and attention do not."""

import pytest
import torch
from torch import nn

from moeopt.capture.tape import record
from moeopt.find.choosing_products import choosing_products

H = 16


def linear(*sizes):
    return nn.ModuleDict({name: nn.Linear(H, size) for name, size in zip("abcd", sizes, strict=False)})


class Case(nn.Module):
    """Products ``a`` to ``d`` and a function of them."""

    def __init__(self, function, *sizes):
        super().__init__()
        self.m, self.function, self.table = linear(*sizes), function, nn.Parameter(torch.randn(4, H))

    def forward(self, x):
        return self.function(self, x, **self.m)


def threshold(self, x, a, b, c):
    p = torch.sigmoid(a(x))
    p = torch.where(p > 0.5, p, torch.zeros_like(p))
    return p[..., :1] * b(x) + p[..., 1:] * c(x)


def dense_table(self, x, a, b, c):
    w, ids = torch.softmax(a(x), -1).topk(1)
    table = torch.zeros(*x.shape[:-1], 2).scatter(-1, ids, w)
    return table[..., :1] * b(x) + table[..., 1:] * c(x)


def masked_rows(self, x, a, b, c):
    chosen = a(x).argmax(-1)
    y = torch.zeros_like(x)
    for n, expert in enumerate((b, c)):
        y[chosen == n] = expert(x[chosen == n])
    return y


def tokens_picked(self, x, a, b):
    ids = a(x).squeeze(-1).topk(2, -1).indices[..., None].expand(-1, -1, H)
    return x.scatter_add(1, ids, b(x.gather(1, ids)))


def cast(self, x, a):
    return x + self.table[(a(x).squeeze(-1) * 3).long().clamp(0, 3)]


def a_sequence(self, x, a):
    return x + self.table[a(x).mean(1).argmax(-1)][:, None]


def a_branch(self, x, a, b):
    return b(x) if a(x).mean().item() > -100 else x


def an_array(self, x, a, b):
    order = a(x).squeeze(-1).detach().numpy().argsort(-1)[0]
    return b(x)[:, order.tolist()]


def dispatch_by_product(self, x, a, b):
    mask = torch.nn.functional.one_hot(a(x).argmax(-1), 4).float()
    return b(x) + mask @ (mask.transpose(-1, -2) @ x)


CHOOSE = [
    (threshold, (2, H, H), "gt at "), (dense_table, (2, H, H), "topk at "), (masked_rows, (2, H, H), "argmax at "),
    (tokens_picked, (1, H), "topk at "), (cast, (1,), "a cast to integers at "), (a_sequence, (4,), "argmax at "),
    (a_branch, (1, H), "a Python value at "), (an_array, (1, H), "a Python value at "),
    (dispatch_by_product, (4, H), "argmax at "),
]  # fmt: skip


def chosen(function, sizes):
    torch.manual_seed(0)
    model = Case(function, *sizes).eval()
    tape = record(model, (torch.randn(2, 6, H),), keep_values=False, lenient=True)
    return choosing_products(tape, [f"m.{name}" for name in model.m])


@pytest.mark.parametrize(("function", "sizes", "words"), CHOOSE, ids=lambda x: getattr(x, "__name__", ""))
def test_a_product_that_a_choice_is_made_from_is_named_with_the_line(function, sizes, words):
    found = chosen(function, sizes)
    assert list(found) == ["m.a"] and found["m.a"].startswith(words)
    assert "test_choosing_products.py:" in found["m.a"]


def activation(self, x, a, b):
    h = a(x)
    h = torch.where(h > 0, h, 0.1 * h) * (h > -9)
    return b((h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))[..., :H])


def attention(self, x, a, b, c, d):
    scores = a(x) @ b(x).transpose(-1, -2) + torch.full((6, 6), -1e9).triu(1)
    scores = scores - scores.max(-1, keepdim=True).values
    return d(torch.softmax(scores, -1) @ c(x))


def fake_quantised(self, x, a, b):
    h = a(x)
    step = h.abs().amax(-1, keepdim=True) / 127
    return b((h / step).round() * step)


def labels_at_the_end(self, x, a, b):
    return a(b(x)).argmax(-1)


def behind_another_product(self, x, a):
    return x + self.table[(a(x) @ self.table.t()).argmax(-1)]


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (activation, (4 * H, H)), (attention, (H, H, H, H)), (fake_quantised, (H, H)), (labels_at_the_end, (3, H)),
        (behind_another_product, (H,)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_other_products_do_not_choose(function, sizes):
    assert chosen(function, sizes) == {}
