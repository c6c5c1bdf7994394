"""The graph that is emitted is the program that was written: no constant is taken for another."""

import builtins
import contextlib
import math

import pytest
import torch

pytest.importorskip("onnxscript")

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import pattern
from onnxscript.rewriter._matcher import SimplePatternMatcher

from moeopt.lower.onnx import export
from moeopt.lower.onnx.exact import exact_rules
from tests.lower.onnx.emitted import graph_of, magnitudes, session_of, together

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NEAR_ZERO = [1e-9, -9.9e-9, 1e-20, 1e-40]
NEAR_ONE = [1 - 1e-6, 1.000005, 0.999995, -1.000005]
NEAR_EACH_OTHER = [3.0, 3.00001, 3.0000002]
CONSTANTS = [*NEAR_ZERO, *NEAR_ONE, *NEAR_EACH_OTHER, 0.0, 1.0, -1.0]


def arithmetic(c):
    return [
        lambda x: x + c,
        lambda x: c + x,
        lambda x: x - c,
        lambda x: c - x,
        lambda x: x * c,
        lambda x: c * x,
        lambda x: x / (c or 1.0),
        lambda x: c / (x.abs().clamp(1e-3, 1e3)),
        lambda x: x.abs().clamp(1e-3, 1e3) ** c,
        lambda x: (c if c > 0 else 2.0) ** x.clamp(-10, 10),
        lambda x: x.clamp(min=c),
        lambda x: x.clamp(max=c),
        lambda x: x.clamp(c, abs(c) + 1),
    ]


def comparison(c):
    return [lambda x: x > c, lambda x: c >= x, lambda x: x < c, lambda x: x == c, lambda x: x != c]


def differences(dtype, kind, constants=CONSTANTS):
    """Numbers of ``constants`` with which some operation gives something else in the graph than in PyTorch."""
    functions = [(c, f) for c in constants for f in kind(c)]
    x = torch.cat([magnitudes(dtype), torch.tensor(constants, dtype=dtype)])
    session = session_of(together([f for _, f in functions]), x[:5])
    eps, found = torch.finfo(dtype).eps, []
    for (c, f), got in zip(functions, session.run({"x": x}), strict=True):
        want = f(x)
        if want.dtype == torch.bool:
            same = got == want
        else:
            got, want = got.double(), want.double()
            near = (got - want).abs() <= 4 * eps * want.abs() + torch.finfo(dtype).tiny * eps * 2
            same = (got == want) | (got.isnan() & want.isnan()) | near
        if not bool(same.all()):
            found.append((c, x[~same][0].item()))
    return found


@pytest.mark.parametrize("kind", [arithmetic, comparison])
def test_every_constant_is_in_the_graph(kind):
    assert differences(torch.float32, kind) == []


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", [arithmetic, comparison])
def test_constants_are_in_graphs_of_other_dtypes(kind, dtype):
    """Each dtype has a third of the constants, and the three dtypes have them all."""
    assert differences(dtype, kind, CONSTANTS[DTYPES[1:].index(dtype) :: 3]) == []


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", [arithmetic, comparison])
def test_every_constant_is_in_graphs_of_other_dtypes(kind, dtype):
    assert differences(dtype, kind) == []


def test_without_exact_rules_the_sweep_fails(monkeypatch):
    monkeypatch.setattr(export, "exact_rules", lambda: contextlib.nullcontext(True))
    lost = {c for c, _ in differences(torch.float32, lambda c: arithmetic(c)[:7], [1e-9, 0.999995, 3.0])}
    assert lost == {1e-9, 0.999995}


def test_a_row_of_zeros_keeps_its_epsilon():
    def rms(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)

    def renormalised(x):
        w = torch.relu(x)
        return w / (w.sum(-1, keepdim=True) + 1e-9)

    session = session_of(together([rms, renormalised]), torch.randn(3, 4))
    for x in (torch.zeros(2, 4), torch.full((2, 4), 1e-5), -torch.ones(2, 4)):
        for got, want in zip(session.run({"x": x}), (rms(x), renormalised(x)), strict=True):
            assert torch.allclose(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("f", "stays"),
    [
        (lambda x: x * 1.0, 0),
        (lambda x: x / 1.0, 0),
        (lambda x: x - 0.0, 0),
        (lambda x: x + -0.0, 0),
        (lambda x: x + 0.0, 1),  # -0.0 + 0.0 is 0.0
        (lambda x: x - -0.0, 1),
        (lambda x: x * 1.0000001, 1),
    ],
)
def test_what_computes_nothing_is_still_left_out(f, stays):
    kinds = [node.op_type for node in graph_of(f, torch.randn(3)).graph]
    assert len([kind for kind in kinds if kind != "Identity"]) == stays
    got = session_of(f, torch.randn(3)).run({"x": torch.tensor([-0.0, 0.0, 1.0])})[0]
    assert (1 / got).tolist() == (1 / f(torch.tensor([-0.0, 0.0, 1.0]))).tolist()


def test_two_clamps_are_two():
    """Taken for one of the tighter bounds, clamp(0, 1) and clamp(2, 3) would be 1."""

    def f(x):
        return x.clamp(0, 1).clamp(2, 3), torch.relu(x.clamp(min=-1)), x.clamp(min=0).clamp(max=math.inf)

    x = torch.tensor([-5.0, 0.5, 5.0, math.inf, -math.inf, math.nan])
    for got, want in zip(session_of(f, torch.randn(3)).run({"x": x}), f(x), strict=True):
        assert torch.equal(got.nan_to_num(9), want.nan_to_num(9))


def test_a_scale_close_to_the_usual_one_stays():
    from onnxscript.rewriter.ort_fusions import sdpa

    assert sdpa.math.isclose(0.25, 0.250001, rel_tol=1e-5)
    with exact_rules() as exact:
        assert exact and not sdpa.math.isclose(0.25, 0.250001, rel_tol=1e-5)
        assert sdpa.math.isclose(0.25, 0.25, rel_tol=1e-5) and sdpa.math.sqrt(4) == 2
    assert sdpa.math is math


def test_everything_is_put_back():
    rules, match = rewriter._DEFAULT_REWRITE_RULES, SimplePatternMatcher._match_constant
    with exact_rules():
        assert 0 < len(rewriter._DEFAULT_REWRITE_RULES) < len(rules)
        assert SimplePatternMatcher._match_constant is not match
    assert rewriter._DEFAULT_REWRITE_RULES is rules and SimplePatternMatcher._match_constant is match


def test_a_number_written_in_a_rule_matches_its_rounding_in_the_graph():
    """A rule's 0.1 is the float32 0.1 of the graph, and not the one beside it."""

    def before(op, x):
        return op.Mul(x, 0.1)

    def after(op, x):
        return op.Neg(x)

    def count(number):
        x, c = ir.val("x", ir.DataType.FLOAT, [2]), ir.tensor(number, dtype=ir.DataType.FLOAT, name="c")
        value = ir.Value(name="c", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]), const_value=c)
        node = ir.node("Mul", [x, value])
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20})
        rules = pattern.RewriteRuleSet([pattern.RewriteRule(before, after)])
        return rules.apply_to_model(ir.Model(graph, ir_version=10))

    assert count(0.1000001) == 1
    with exact_rules():
        assert count(0.1) == 1 and count(0.1000001) == 0


def test_another_version_of_onnxscript_is_not_asked_to_simplify(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxscript.rewriter._matcher":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with exact_rules() as exact:
        assert not exact
    x = torch.zeros(3)
    assert torch.equal(session_of(lambda x: 1 / (x * 1.0 + 1e-9), x).run({"x": x})[0], 1 / (x + 1e-9))
