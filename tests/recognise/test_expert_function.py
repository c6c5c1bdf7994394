"""The function between an expert's matmuls is found by what it computes, however it is written."""

import math

import pytest
import torch
import torch.nn.functional as F

from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.recognise.expert_function import fit_function
from moeopt.recognise.ffn_candidates import find_candidates
from moeopt.recognise.gemm_sites import find_sites
from tests.capture.tiny import rand, recorded

R, H, I = 9, 5, 6


def fitted(between, *, gated=False, dtype=torch.float32, separate=False, assume=None):
    """(spec, second in-site is the gate) of W_in -> between -> W_out."""
    rows = 2 * I if gated else I

    def fn(m, x):
        h = (x @ m.w_gate, x @ m.w_up) if separate else (x @ m.w_in,)
        return between(*h) @ m.w_out

    tape = recorded(
        fn, rand(R, H, dtype=dtype), w_in=rand(H, rows, seed=1, dtype=dtype), w_out=rand(I, H, seed=2, dtype=dtype),
        w_gate=rand(H, I, seed=3, dtype=dtype), w_up=rand(H, I, seed=4, dtype=dtype),
    )  # fmt: skip
    (candidate,) = find_candidates(tape, find_sites(tape))
    return fit_function(tape, candidate, candidate.out, torch.arange(R), assume)


def tanh_gelu(h):
    return 0.5 * h * (1 + torch.tanh(0.7978845608 * (h + 0.044715 * h**3)))


@pytest.mark.parametrize(
    ("between", "activation", "alpha"),
    [
        (F.relu, "relu", None),
        (lambda h: h.clamp(min=0), "relu", None),
        (lambda h: torch.where(h > 0, h, 0.0), "relu", None),
        (lambda h: torch.maximum(h, torch.zeros_like(h)), "relu", None),
        (lambda h: h * (h > 0), "relu", None),
        (lambda h: F.relu(h) ** 2, "relu2", None),
        (lambda h: F.relu(h).square(), "relu2", None),
        (F.silu, "silu", None),
        (lambda h: h * torch.sigmoid(h), "silu", None),
        (lambda h: h / (1 + torch.exp(-h)), "silu", None),
        (F.gelu, "gelu", None),
        (lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))), "gelu", None),
        (lambda h: F.gelu(h, approximate="tanh"), "gelu_tanh", None),
        (tanh_gelu, "gelu_tanh", None),
        (lambda h: h * torch.sigmoid(1.702 * h), "swish", 1.702),
        (lambda h: h * torch.sigmoid(2.5 * h), "swish", 2.5),
        (lambda h: 30.0 * torch.tanh(h / 30.0), "softcap", 30.0),
        (lambda h: F.leaky_relu(h, 0.2), "leaky_relu", 0.2),
        (F.leaky_relu, "leaky_relu", 0.01),
        (F.elu, "elu", 1.0),
        (torch.sigmoid, "sigmoid", None),
        (torch.tanh, "tanh", None),
        (F.mish, "mish", None),
        (lambda h: h * torch.tanh(F.softplus(h)), "mish", None),
        (F.softplus, "softplus", None),
        (lambda h: F.dropout(F.silu(h), 0.1, training=False), "silu", None),
    ],
)
def test_plain_functions(between, activation, alpha):
    spec, flip = fitted(between)
    assert (spec.rows, spec.activation, spec.alpha, flip) == ("plain", activation, alpha, False)


@pytest.mark.parametrize(
    ("between", "rows"),
    [
        (lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], "gate|up"),
        (lambda h: h[:, :I] * F.silu(h[:, I:]), "up|gate"),
        (lambda h: F.silu(h[:, ::2]) * h[:, 1::2], "interleaved"),
        (lambda h: F.silu(h.view(-1, I, 2)[..., 1]) * h.view(-1, I, 2)[..., 0], "interleaved_up"),
        (lambda h: (lambda g, u: g * torch.sigmoid(g) * u)(*h.split(I, -1)), "gate|up"),
    ],
)
def test_packed_rows(between, rows):
    spec, _ = fitted(between, gated=True)
    assert (spec.rows, spec.activation) == (rows, "silu")


def test_glu_is_a_sigmoid_on_the_second_half():
    spec, _ = fitted(lambda h: F.glu(h, -1), gated=True)
    assert (spec.rows, spec.activation) == ("up|gate", "sigmoid")


def test_of_two_products_the_gate_is_found():
    assert fitted(lambda a, b: F.gelu(a) * b, separate=True)[1] is False
    spec, flip = fitted(lambda a, b: a * F.gelu(b), separate=True)
    assert (spec.rows, spec.activation, flip) == ("separate", "gelu", True)


def test_a_product_of_two_tensors_without_activation():
    spec, _ = fitted(lambda a, b: a * b, separate=True)
    assert (spec.rows, spec.activation) == ("separate", "identity")


def test_clamps_and_offset_of_gpt_oss():
    def between(h):
        gate, up = h[..., ::2], h[..., 1::2]
        gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    spec, _ = fitted(between, gated=True)
    assert spec.rows == "interleaved" and (spec.activation, spec.alpha, spec.up_offset) == ("swish", 1.702, 1.0)
    assert (spec.gate_min, spec.gate_max, spec.up_min, spec.up_max) == (None, 7.0, -7.0, 7.0)


@pytest.mark.parametrize(
    ("between", "places"),
    [
        (lambda a, b: F.silu(a.clamp(max=5.0)) * b, {"gate_max": 5.0}),
        (lambda a, b: F.silu(a) * b.clamp(-4.0, 4.0), {"up_min": -4.0, "up_max": 4.0}),
        (lambda a, b: F.silu(a).clamp(max=3.0) * b, {"act_max": 3.0}),
        (lambda a, b: F.silu(a.clamp(-9.0, 9.0)) * b.clamp(-9.0, 9.0),
         {"gate_min": -9.0, "gate_max": 9.0, "up_min": -9.0, "up_max": 9.0}),
        (lambda a, b: F.silu(torch.minimum(a, torch.tensor(5.0))) * b, {"gate_max": 5.0}),
    ],
)  # fmt: skip
def test_each_clamp_finds_its_place(between, places):
    spec, _ = fitted(between, separate=True)
    names = ("gate_min", "gate_max", "up_min", "up_max", "act_min", "act_max")
    assert {n: getattr(spec, n) for n in names if getattr(spec, n) is not None} == places


def test_the_dtype_of_the_activation_is_part_of_the_spec():
    spec, _ = fitted(lambda h: F.silu(h.float()).to(torch.bfloat16), dtype=torch.bfloat16)
    assert (spec.compute_dtype, spec.act_dtype) == ("bfloat16", "float32")
    spec, _ = fitted(F.silu, dtype=torch.bfloat16)
    assert (spec.compute_dtype, spec.act_dtype) == ("bfloat16", None)


def test_almost_the_same_is_not_the_same():
    with pytest.raises(Declined):
        fitted(lambda h: 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.0447 * h**3))))


@pytest.mark.parametrize(
    ("between", "ops"),
    [
        (lambda h: torch.sin(h), "sin"),
        (lambda h: F.silu(h) * 2, "silu, mul"),
        (lambda h: F.relu(h) ** 3, "relu, pow"),
        (lambda h: F.silu(h) + h, "silu, add"),
        (lambda h: F.silu(h) * h.sign(), "silu, sign, mul"),
    ],
)
def test_a_function_outside_the_family_is_declined_by_its_ops(between, ops):
    with pytest.raises(Declined) as caught:
        fitted(between)
    text = f"the function between the expert's two matmuls ({ops}) is none that the op carries (silu, "
    assert text in caught.value.reason and "pass hints= to name it" in caught.value.reason
    assert "test_expert_function.py:" in caught.value.where


def test_a_hint_is_taken_at_its_word():
    hint = ExpertsSpec(rows="plain", activation="tanh")
    spec, flip = fitted(lambda h: torch.sin(h), assume=hint)
    assert (spec.activation, spec.compute_dtype, flip) == ("tanh", "float32", False)
    assert fitted(F.relu)[0].activation == "relu"
