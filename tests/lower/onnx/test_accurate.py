"""Small results keep their digits in an emitted graph: each function against float64, over the whole range."""

import math

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("onnxruntime")

from moeopt.backends.onnxrt.session import Session
from moeopt.errors import NotSaveableError
from moeopt.lower.onnx import accurate
from tests.lower.onnx.emitted import graph_of, magnitudes, session_of, together

FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "logarithm of sigmoid": lambda x: x.sigmoid().log(),
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": lambda x: x * torch.sigmoid(1.702 * x),
    "a gate": lambda x: torch.sigmoid(x) * 2.5,
    "log1p": torch.log1p,
    "softplus written out": lambda x: torch.log1p(torch.exp(x)),
    "softplus": F.softplus,
    "root of softplus": lambda x: F.softplus(x).sqrt(),
    "expm1": torch.expm1,
    "elu": F.elu,
    "elu, other alpha": lambda x: F.elu(x, 0.37),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 1.3),
    "mish": F.mish,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu": lambda x: F.gelu(x.clamp(-1e30, 1e30)),
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "1 + tanh": lambda x: torch.tanh(x / 2) + 1,
    "1/2 + tanh/2": lambda x: 0.5 + 0.5 * torch.tanh(x),
    "power of one half": lambda x: x**0.5,
    "power of minus one half": lambda x: x**-0.5,
    "power of minus two": lambda x: x**-2,
    "logaddexp": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "sign": torch.sign,
    "clamp from below": lambda x: x.clamp(min=1e-9),
    "clamp from above": lambda x: x.clamp(max=5.0),
    "remainder": lambda x: x % 3,
    "remainder of a negative": lambda x: torch.remainder(x, -0.7),
    "floor division": lambda x: x // 3,
    "division to zero": lambda x: torch.div(x, 3.0, rounding_mode="trunc"),
    "exp": torch.exp,
    "log": torch.log,
    "erf": torch.erf,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
}
SPECIAL = [0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38]
EPS, LEAST = 2.0**-24, 2.0**-120


def off(f, x, got):
    """Where ``got`` of float32 ``x`` is neither PyTorch's number nor as near to float64 as PyTorch's nearby."""
    want, ours, got = f(x.double()).double(), f(x).double(), got.double()
    allowed = (ours - want).abs().nan_to_num(nan=math.inf)
    allowed = 8 * F.max_pool1d(allowed[None], 65, 1, 32)[0]
    same = (got == ours) | (got.isnan() & ours.isnan())
    near = (got - want).abs() <= torch.maximum(16 * EPS * want.abs(), allowed) + EPS * LEAST
    return ~(same | near) & ~((want.abs() > 3.4e38) & got.isinf())


@pytest.fixture(scope="module")
def session():
    return session_of(together(FUNCTIONS.values()), torch.randn(7))


def test_every_function_is_as_accurate_as_pytorch(session):
    x = magnitudes(torch.float32)
    results = session.run({"x": x})
    found = {name: x[off(f, x, got)].tolist()[:3] for (name, f), got in zip(FUNCTIONS.items(), results, strict=True)}
    assert {name: where for name, where in found.items() if where} == {}


def test_special_numbers_alone_and_together(session):
    x = torch.tensor(SPECIAL)
    for name, f, got in zip(FUNCTIONS, FUNCTIONS.values(), session.run({"x": x}), strict=True):
        want = f(x)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-36, equal_nan=True), name
    for n in range(len(x)):
        for name, got, whole in zip(FUNCTIONS, session.run({"x": x[n : n + 1]}), session.run({"x": x}), strict=True):
            assert torch.equal(got.nan_to_num(7e7), whole[n : n + 1].nan_to_num(7e7)), name
    assert all(got.shape == (0,) for got in session.run({"x": x[:0]}))


COARSE = {
    "Sigmoid": torch.sigmoid,
    "Elu": F.elu,
    "Selu": F.selu,
    "Celu": F.celu,
    "Mish": F.mish,
    "HardSigmoid": F.hardsigmoid,
    "HardSwish": F.hardswish,
    "Tanh": lambda x: torch.tanh(x) + 1,
    "Sign": torch.sign,
}


@pytest.mark.parametrize("op", COARSE)
def test_without_its_form_each_is_found(op, monkeypatch):
    """The sweep can fail: with one form taken away, it finds that operator."""
    f = COARSE[op]
    monkeypatch.setattr(accurate, "FORMS", {k: v for k, v in accurate.FORMS.items() if k != op})
    x = magnitudes(torch.float32)
    x = torch.cat([x, torch.linspace(-3.1, -2.9, 801), torch.linspace(-10, -8, 4001), torch.full((40,), math.nan)])
    assert bool(off(f, x, session_of(f, torch.randn(7)).run({"x": x})[0]).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    names = ["sigmoid", "silu", "log1p", "expm1", "logsigmoid", "elu", "mish", "softplus written out"]
    x = magnitudes(dtype)
    x = x[x.abs() < (700 if dtype == torch.float64 else 80)]
    results = session_of(together([FUNCTIONS[n] for n in names]), x[:5]).run({"x": x})
    for name, got in zip(names, results, strict=True):
        want, eps = FUNCTIONS[name](x.double()), torch.finfo(dtype).eps
        assert got.dtype == dtype
        near = (got.double() - want).abs() <= 16 * eps * want.abs() + 16 * torch.finfo(dtype).tiny * eps
        ours = FUNCTIONS[name](x).double()  # where PyTorch overflows inside
        near |= (got.double() == ours) | (got.isnan() & ours.isnan())
        assert bool(near.all()), (name, x[~near][:3])


def kinds(f, x=None):
    return [node.op_type for node in graph_of(f, torch.randn(3, 4) if x is None else x).graph]


def test_silu_is_one_quotient():
    assert kinds(F.silu) == ["Neg", "Exp", "Add", "Div"]
    assert kinds(lambda x: x * torch.sigmoid(1.702 * x)) == ["Mul", "Neg", "Exp", "Add", "Div"]
    assert kinds(F.glu).count("Reciprocal") == 1  # its two factors are different


def test_a_sigmoid_that_is_also_read_elsewhere_is_written_for_both():
    def f(x):
        s = torch.sigmoid(x)
        return x * s, s

    session = session_of(f, torch.randn(3))
    x = torch.tensor([-40.0, -20.0, 3.0])
    for got, want in zip(session.run({"x": x}), f(x), strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=0)


def test_tanh_stays_where_no_digits_are_lost():
    w = torch.randn(4, 4)
    assert "Where" not in kinds(lambda x: 30 * torch.tanh(x / 30))
    assert "Where" not in kinds(lambda x: (x * 0.5 * (1 + torch.tanh(x))) @ w)
    assert "Where" in kinds(lambda x: x * 0.5 * (1 + torch.tanh(x)))
    assert kinds(lambda x: F.gelu(x, approximate="tanh") @ w)[0] == "Gelu"
    assert "Gelu" not in kinds(lambda x: F.gelu(x, approximate="tanh"))


def test_sigmoid_inside_a_branch_and_in_16_bits():
    """A node of a subgraph is rewritten in it; 16-bit values are float32 inside; names and shapes of ends stay."""
    half = ir.TensorType(ir.DataType.FLOAT16)
    x = ir.Value(name="x", type=half, shape=ir.Shape(["N"]))
    flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))

    def branch(op, name):
        node = ir.node(op, [x], name=name)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, half, x.shape
        return ir.Graph([], node.outputs, nodes=[node], name=name)

    chosen = ir.node("If", [flag], {"then_branch": branch("Sigmoid", "s"), "else_branch": branch("Neg", "n")})
    y = chosen.outputs[0]
    y.name, y.type, y.shape = "y", half, x.shape
    model = ir.Model(ir.Graph([x, flag], [y], nodes=[chosen], opset_imports={"": 20}, name="g"), ir_version=10)
    assert accurate.accurate_graph(model) == 1
    assert accurate.accurate_graph(model) == 0
    session = Session(ir.to_proto(model).SerializeToString())
    numbers = torch.tensor([-16.0, -9.0, 2.0], dtype=torch.float16)
    got = session.run({"x": numbers, "flag": torch.tensor(True)})[0]
    assert torch.equal(got, numbers.sigmoid()) and got[0] > 0


@pytest.mark.parametrize("f", [torch.erfc, torch.special.log_ndtr])
def test_a_tail_that_no_form_keeps_is_refused(f):
    with pytest.raises(
        NotSaveableError, match=r"keeps its small results.*test_accurate|keeps its small results.*emitted"
    ):
        graph_of(f, torch.randn(3))


VANISHING = {
    "1 + elu": lambda x: F.elu(x) + 1,
    "1 + expm1": lambda x: torch.expm1(x) + 1,
    "1 + celu": lambda x: F.celu(x, 1.0) + 1,
    "alpha + celu": lambda x: F.celu(x, 0.5) + 0.5,
    "1 - sigmoid": lambda x: 1 - torch.sigmoid(x),
    "1 - tanh": lambda x: 1 - torch.tanh(x),
    "1 + tanh": lambda x: torch.tanh(x / 2) + 1,
    "softsign": lambda x: 1 - F.softsign(x),
    "1 - hardsigmoid": lambda x: 1 - F.hardsigmoid(x),
    "1 - erf": lambda x: 1 - torch.erf(x / 6),
    "exp - 1": lambda x: torch.exp(x * 1e-8) - 1,
    "softplus": F.softplus,
    "silu": F.silu,
}
"""Sums that are exactly 0 from some x on: a router that divides by them is NaN there, and must not be finite."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_exactly_0_in_pytorch_is_0(dtype):
    """As PyTorch's vector kernels have it: its last few elements are computed one by one, and round otherwise."""
    x = torch.linspace(-60, 60, 64 * 500, dtype=torch.float64).to(dtype)
    if dtype == torch.float64:
        names = [name for name in VANISHING if name not in ("1 - erf", "1 - hardsigmoid")]  # no kernels of float64
    else:
        names = list(VANISHING)
    results = session_of(together([VANISHING[name] for name in names]), torch.randn(7, dtype=dtype)).run({"x": x})
    other = {name: x[(VANISHING[name](x) == 0) != (got == 0)] for name, got in zip(names, results, strict=True)}
    ends = {name: (at.abs().min().item(), at.abs().max().item()) for name, at in other.items() if len(at)}
    # tanh and erf differ in their last digit, so that their sums vanish 0.02 % and 0.2 % earlier or later
    assert {name: (a, b) for name, (a, b) in ends.items() if b > 1.003 * a or name.startswith("1 + e")} == {}
