"""Dense FFNs in every layout read as one expert; the counts, the function, where the gate is; and each refusal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.recognise.dense_ffn import candidate_weights, find_dense, recognize_dense
from moeopt.recognise.ffn_candidates import find_candidates
from moeopt.recognise.gemm_sites import find_sites
from tests.capture.tiny import rand
from tests.recognise.tiny import GLU, H, I, ffn, seeded


class Packed(nn.Module):
    def __init__(self, order="gate|up", bias=False):
        super().__init__()
        self.w13, self.w2, self.order = nn.Linear(H, 2 * I, bias=bias), nn.Linear(I, H, bias=bias), order

    def forward(self, x):
        h = self.w13(x)
        if self.order == "interleaved":
            g, u = h[..., 0::2], h[..., 1::2]
        else:
            a, b = h.chunk(2, dim=-1)
            g, u = (a, b) if self.order == "gate|up" else (b, a)
        return self.w2(F.silu(g) * u)


class UpFirst(GLU):
    def forward(self, x):
        u = self.up(x)
        return self.down(u * self.act(self.gate(x)))


class Conv1D(nn.Module):
    """As GPT-2 stores it: (in, out)."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(rand(H, I)), nn.Parameter(rand(I, seed=1))
        self.w2, self.b2 = nn.Parameter(rand(I, H, seed=2)), nn.Parameter(rand(H, seed=3))

    def forward(self, x):
        h = F.gelu(torch.addmm(self.b1, x.view(-1, H), self.w1), approximate="tanh")
        return torch.addmm(self.b2, h, self.w2).view(x.shape)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(H, I, 1), nn.Conv2d(I, H, 1)

    def forward(self, x):
        return self.c2(F.gelu(self.c1(x)))


class Dropped(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(H, I), nn.Mish(), nn.Dropout(0.5), nn.Linear(I, H), nn.Dropout(0.5))


def read(make, *args):
    tape = record(seeded(make), args or (rand(2, 5, H),))
    (candidate,) = find_candidates(tape, find_sites(tape))
    return recognize_dense(tape, candidate)


FORMS = [
    (ffn, "plain", "relu", ("oi", "oi"), 1),
    (lambda: ffn(nn.GELU, bias=False), "plain", "gelu", ("oi", "oi"), 0),
    (Dropped, "plain", "mish", ("oi", "oi"), 1),
    (Conv1D, "plain", "gelu_tanh", ("io", "io"), 1),
    (GLU, "separate", "silu", ("oi", "oi"), 0),
    (UpFirst, "separate", "silu", ("oi", "oi"), 0),
    (Packed, "gate|up", "silu", ("oi", "oi"), 0),
    (lambda: Packed("up|gate", True), "up|gate", "silu", ("oi", "oi"), 1),
    (lambda: Packed("interleaved", True), "interleaved", "silu", ("oi", "oi"), 1),
]


@pytest.mark.parametrize(("make", "rows", "activation", "layouts", "biases"), FORMS)
def test_each_form(make, rows, activation, layouts, biases):
    found = read(make)
    assert (found.spec.rows, found.spec.activation) == (rows, activation)
    assert (found.spec.w_in_layout, found.spec.w_out_layout) == layouts
    assert found.inner == I and len(found.weights.w_in) == (2 if rows == "separate" else 1)
    assert sum(b is not None for b in (*found.weights.b_in, found.weights.b_out)) == 2 * biases
    assert found.spec.accum_dtype == "float32" and found.spec.out_dtype == "float32"


def test_the_gate_comes_first_whichever_is_computed_first():
    assert [w.path for w in read(UpFirst).weights.w_in] == ["gate.weight", "up.weight"]


def test_one_by_one_convolutions():
    found = read(Convolutions, rand(2, H, 3, 4))
    assert (found.axis_in, found.axis_out, found.inner, found.spec.activation) == (1, 1, I, "gelu")
    assert found.weights.w_in[0].path == "c1.weight" and found.weights.b_out is not None


def test_chains_are_picked_by_their_weights():
    model = seeded(lambda: nn.Sequential(ffn(), ffn()))
    tape = record(model, (rand(5, H),))
    wanted = frozenset({id(model[1][0].weight), id(model[1][2].weight)})
    (candidate,) = find_dense(tape, [wanted])
    assert candidate_weights(tape, candidate) == wanted and candidate.out.matrices[0].path == "1.2.weight"
    assert find_dense(tape, [frozenset({id(model[0][0].weight)})]) == []


class Odd(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(H, I), _Sine(), nn.Linear(I, H))


class _Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x) * 0.5 + F.relu(x)


class Flipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).flip(0))


class TwoInputs(GLU):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x.flip(0)))


class TwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(H, I).bfloat16(), nn.Linear(I, H)

    def forward(self, x):
        return self.b(F.relu(self.a(x.bfloat16())).float())


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h), h


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Odd, "is none that the op carries"),
        (Flipped, "rows are mixed, reordered or left out"),
        (TwoInputs, "its gate and up matmuls read different rows"),
        (TwoDtypes, "its matmuls run in different dtypes (torch.bfloat16, torch.float32)"),
        (Kept, "what stands between its matmuls is used outside it too"),
    ],
)
def test_declines_with_a_reason(make, reason):
    with pytest.raises(Declined) as caught:
        read(make, rand(6, H))
    assert reason in caught.value.reason
