"""The router op against formulas of its own, its gradient, and its one node under export."""

import itertools

import pytest
import torch

from moeopt.errors import UsageError
from moeopt.ir.specs import RouterSpec
from moeopt.ops import route

E, K = 7, 3
ALL = [
    RouterSpec(score, K, E, renormalize, dtype)
    for score, renormalize, dtype in itertools.product(
        ("softmax_topk", "topk_softmax"), (False, True), (None, "float32")
    )
]


def logits(T, dtype=torch.float64):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_equals_the_formula(spec):
    l = logits(5, torch.float32)
    ids, weights = route(l, spec)
    for t in range(5):
        row = [float(v) for v in l[t]]
        order = sorted(range(E), key=lambda e: -row[e])[:K]
        powers = torch.tensor(row, dtype=torch.float64).exp()
        over = powers[order].sum() if spec.renormalize or spec.score == "topk_softmax" else powers.sum()
        assert ids[t].tolist() == order
        torch.testing.assert_close(weights[t].double(), powers[order] / over, rtol=8 * 1.2e-7, atol=0)


def test_dtypes_and_shapes():
    ids, weights = route(logits(4, torch.bfloat16), RouterSpec("softmax_topk", K, E, dtype="float32"))
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32 and ids.shape == weights.shape == (4, K)
    assert route(logits(4, torch.bfloat16), RouterSpec("topk_softmax", K, E))[1].dtype == torch.bfloat16
    assert route(logits(0), RouterSpec("softmax_topk", K, E))[0].shape == (0, K)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_gradient_and_opcheck(spec):
    l = logits(3).requires_grad_()
    if spec.dtype is None:
        assert torch.autograd.gradcheck(lambda z: route(z, spec)[1], [l])
    op, rest = torch.ops.moeopt.route.default, (spec.score, K, spec.renormalize, spec.dtype or "")
    torch.library.opcheck(op, (logits(3, torch.float32), *rest))
    # opcheck's backward test adds a float to the sum of the integer ids, and so cannot take a leaf
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (logits(3, torch.float32).requires_grad_(), *rest), test_utils=some)


def test_compiled_gradient_is_the_eager_one():
    torch._dynamo.reset()
    l = logits(3).requires_grad_()
    compiled = torch.compile(lambda z: route(z, ALL[0])[1].square().sum(), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(l), [l])
    (want,) = torch.autograd.grad(route(l, ALL[0])[1].square().sum(), [l])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_exports_as_one_node():
    class Router(torch.nn.Module):
        def forward(self, l):
            return route(l, ALL[0])

    tokens = torch.export.Dim("tokens")
    program = torch.export.export(Router(), (logits(4),), dynamic_shapes=[{0: tokens}])
    assert [n.target for n in program.graph.nodes].count(torch.ops.moeopt.route.default) == 1
    assert torch.equal(program.module()(logits(9))[0], route(logits(9), ALL[0])[0])


def test_refuses_other_widths():
    with pytest.raises(UsageError, match=r"logits are \(4, 7\); they must be \(T, 8\), as the RouterSpec says"):
        route(logits(4), RouterSpec("softmax_topk", 2, 8))
