"""onnxscript's rules matched quickly give the graph that they give slowly."""

import builtins

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")

import onnx_ir as ir
import onnxscript
from onnxscript.rewriter._matcher import SimplePatternMatcher

from moeopt.patches import rules_by_their_last_op

SLOW = SimplePatternMatcher.match


class Layer(nn.Module):
    """What rules of several outputs, commuted inputs and constants look for."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        a, b = self.q(x).chunk(2, -1)
        y = torch.cat([a * 1.0, b + 0.0], -1).reshape(x.shape) * torch.sigmoid(self.k(x))
        return self.norm(x + y.transpose(0, 1).transpose(0, 1))


def graph(layers=3):
    torch.manual_seed(0)
    model = nn.Sequential(*[Layer() for _ in range(layers)]).eval()
    program = torch.onnx.export(model, (torch.randn(3, 4, 8),), dynamo=True, optimize=False, verbose=False)
    return program.model


def optimized(quick):
    model = graph()
    if quick:
        with rules_by_their_last_op():
            onnxscript.optimizer.optimize_ir(model)
    else:
        onnxscript.optimizer.optimize_ir(model)
    return [(n.op_type, n.name, [v and v.name for v in n.inputs]) for n in model.graph]


def test_the_same_graph_with_fewer_looks(monkeypatch):
    want = optimized(quick=False)
    looked = []
    monkeypatch.setattr(SimplePatternMatcher, "match", lambda self, *a, **k: looked.append(1) or SLOW(self, *a, **k))
    optimized(quick=False)
    slow, looked[:] = len(looked), []
    assert optimized(quick=True) == want
    assert 0 < len(looked) < slow / 5


def test_a_rule_of_two_outputs_still_matches():
    from onnxscript.rewriter import pattern

    def both(op, x):
        a, b = op.Sin(x), op.Cos(x)
        return a, b

    def one(op, x):
        return op.SinCos(x, _domain="test", _outputs=2)

    x = ir.val("x", ir.DataType.FLOAT, [2])
    sin, cos, neg = ir.node("Sin", [x]), ir.node("Cos", [x]), ir.node("Neg", [x])
    outputs = [node.outputs[0] for node in (sin, cos, neg)]
    model = ir.Model(ir.Graph([x], outputs, nodes=[neg, sin, cos], opset_imports={"": 20, "test": 1}), ir_version=10)
    with rules_by_their_last_op():
        assert pattern.RewriteRuleSet([pattern.RewriteRule(both, one)]).apply_to_model(model) == 1
    assert [node.op_type for node in model.graph] == ["Neg", "SinCos"]
    assert SimplePatternMatcher.match is SLOW


def test_a_rule_of_two_outputs_lists_the_nodes_only_where_its_first_fits():
    from onnxscript.rewriter import pattern

    def both(op, x):
        return op.Sin(op.Neg(x)), op.Cos(x)

    def one(op, x):
        return op.SinCos(x, _domain="test", _outputs=2)

    class Listed(ir.Graph):
        times = 0

        def __iter__(self):
            self.times += 1
            return super().__iter__()

    def model():
        x = ir.val("x", ir.DataType.FLOAT, [2])
        cos, neg = ir.node("Cos", [x]), ir.node("Neg", [x])
        sin, others = ir.node("Sin", neg.outputs), [ir.node("Sin", [x]) for _ in range(20)]
        nodes = [neg, *others, sin, cos]
        outputs = [node.outputs[0] for node in (*others, sin, cos)]
        return ir.Model(Listed([x], outputs, nodes=nodes, opset_imports={"": 20, "test": 1}), ir_version=10)

    slow, quick = model(), model()
    rules = pattern.RewriteRuleSet([pattern.RewriteRule(both, one)])
    assert rules.apply_to_model(slow) == 1
    with rules_by_their_last_op():
        assert rules.apply_to_model(quick) == 1
    assert [n.op_type for n in quick.graph] == [n.op_type for n in slow.graph]
    assert quick.graph.times < slow.graph.times - 20


def test_another_version_of_onnxscript_is_left_as_it_is(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxscript.rewriter._matcher":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with rules_by_their_last_op():
        assert SimplePatternMatcher.match is SLOW
