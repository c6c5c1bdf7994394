"""Experts with a norm between their products that are no list of modules: found, and no other products for them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moeopt.find.discover import discover
from tests.recognise.tiny import seeded

H, I, E = 8, 12, 4  # noqa: E741


def norm(h, kind):
    if kind == "layer":
        return F.layer_norm(h, h.shape[-1:])
    if kind == "group":
        return F.group_norm(h, 2) if h.dim() == 2 else F.group_norm(h.transpose(-1, -2), 2).transpose(-1, -2)
    if kind == "softmax":
        return h.softmax(-1)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


class Parts(nn.Module):
    """Parameters of one module: a matrix of each expert, or a stack of all (``stacked``)."""

    def __init__(self, kind="layer", stacked=False, chooses=True):
        super().__init__()
        self.kind, self.chooses = kind, chooses
        self.router = nn.Linear(H, E)
        if stacked:
            self.ups, self.downs = nn.Parameter(torch.randn(E, H, I)), nn.Parameter(torch.randn(E, I, H))
        else:
            for e in range(E):
                self.register_parameter(f"up{e}", nn.Parameter(torch.randn(H, I)))
                self.register_parameter(f"down{e}", nn.Parameter(torch.randn(I, H)))

    def forward(self, x):
        scores = self.router(x)
        gates = scores.softmax(-1) if self.chooses else scores.tanh()
        if hasattr(self, "ups"):
            each = torch.bmm(norm(torch.bmm(x.expand(E, -1, -1), self.ups), self.kind).relu(), self.downs)
            return (each * gates.t()[..., None]).sum(0)
        each = [
            norm(x @ getattr(self, f"up{e}"), self.kind).relu() @ getattr(self, f"down{e}") * gates[:, e, None]
            for e in range(E)
        ]
        return sum(each)


class Layers(Parts):
    """The same products one behind another, beside a softmax as wide as they are many."""

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        for e in range(E):
            x = norm(x @ getattr(self, f"up{e}"), self.kind).relu() @ getattr(self, f"down{e}")
        return x * gates.sum(-1, keepdim=True)


class Heads(Parts):
    """Results that lie side by side, and are no sum."""

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        each = [norm(x @ getattr(self, f"up{e}"), self.kind).relu() @ getattr(self, f"down{e}") for e in range(E)]
        return *each, gates


def mixtures(model):
    places = discover(seeded(lambda: model), (torch.randn(6, H),), {})
    return [place for place in places if place.kind == "moe"]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", ["layer", "root of squares", "group", "softmax"])
def test_pairs_around_a_norm_are_a_place(kind, stacked):
    model = Parts(kind, stacked)
    (place,) = mixtures(model)
    weights = [p for name, p in model.named_parameters() if "router" not in name]
    assert place.experts == E and place.weights == set(map(id, weights))


@pytest.mark.parametrize("model", [Parts(chooses=False), Layers(), Heads()], ids=["no gate", "layers", "heads"])
def test_others_are_not(model):
    assert mixtures(model) == []
