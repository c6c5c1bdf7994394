"""Banks of four axes: gate and up stand on an axis of their own beside the experts, as in code written for einsum."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, seq

D, E, HID, K = 16, 4, 12, 2


def rand(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.25)


class Bank(nn.Module):
    """All experts of all tokens, weighed by a table; ``up`` says in which order the axes of the first bank lie."""

    def __init__(self, *axes, down=(E, HID, D)):
        super().__init__()
        self.router, self.up, self.down = nn.Linear(D, E), rand(*axes), rand(*down)

    def table(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K, -1)
        return torch.zeros(*x.shape[:-1], E).scatter(-1, ids, weights)

    def hidden(self, x):
        h = torch.einsum("btd,edcf->btecf", x, self.up)
        return F.silu(h[..., 0, :]) * h[..., 1, :]

    def forward(self, x):
        return torch.einsum("btef,efd,bte->btd", self.hidden(x), self.down, self.table(x))


@case(seq(D), experts=E)
def gate_and_up_behind_the_features():
    return Bank(E, D, 2, HID)


class First(Bank):
    def hidden(self, x):
        gate, up = torch.einsum("btd,cedf->cbtef", x, self.up)
        return F.gelu(gate) * up


@case(seq(D), experts=E)
def gate_and_up_before_the_experts():
    return First(2, E, D, HID)


class Last(Bank):
    def hidden(self, x):
        h = torch.einsum("btd,edfc->btefc", x, self.up)
        return F.silu(h[..., 0]) * h[..., 1]


@case(seq(D), experts=E)
def gate_and_up_behind_the_neurons():
    return Last(E, D, HID, 2)


class WithBiases(Bank):
    def __init__(self, *axes):
        super().__init__(*axes)
        self.b_up, self.b_down = rand(E, 2, HID), rand(E, D)

    def forward(self, x):
        h = torch.einsum("btd,edcf->ebtcf", x, self.up)
        gate, up = h[..., 0, :] + self.b_up[:, None, None, 0], h[..., 1, :] + self.b_up[:, None, None, 1]
        y = torch.einsum("ebtf,efd->ebtd", F.silu(gate) * up, self.down) + self.b_down[:, None, None]
        return torch.einsum("ebtd,bte->btd", y, self.table(x))


@case(seq(D), experts=E)
def gate_and_up_with_biases_of_each():
    return WithBiases(E, D, 2, HID)


class Picked(Bank):
    """The banks' parts of the experts that each token chose; some of many experts no token of a small call chose."""

    def __init__(self, experts=16):
        super().__init__(2, experts, D, HID, down=(experts, HID, D))
        self.router = nn.Linear(D, experts)

    def forward(self, x):
        weight, ids = self.router(x).softmax(-1).topk(1, -1)
        gate, up = torch.einsum("btd,cbtkdf->cbtkf", x, self.up[:, ids])
        return torch.einsum("btkf,btkfd,btk->btd", F.silu(gate) * up, self.down[ids], weight)


@case(seq(D), experts=16)
def gate_and_up_picked_by_ids():
    return Picked()
