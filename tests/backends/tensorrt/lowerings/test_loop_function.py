"""The loop form of row functions: one turn for each expert, whose body is the function once; run by ONNX Runtime."""

import dataclasses

import onnx_ir as ir
import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.tensorrt.graph_check import check_graph
from moeopt.backends.tensorrt.lowerings.loop_function import LoopFunction
from moeopt.backends.tensorrt.plan import TensorRTPlan
from moeopt.backends.tensorrt.target import parse_target
from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.assemble import one_op
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops.experts import experts
from moeopt.ops.override import override_experts_impl
from tests.zoo.row_functions import D, NormInside, Routed

SM_89 = parse_target("sm_89")
BUDGET = 64  # eps of the largest entry: sums of 16 + 24 + 24 + 16 + K terms in another order


def site_of(count):
    """The row function's node of a rewritten block of ``count`` experts, and the call that reaches it."""
    torch.manual_seed(0)
    model, x = Routed(NormInside, n=count).eval(), torch.randn(3, 5, D)
    found = []

    def look(x, ids, weights, bank, spec):
        site = ExpertsNode("block", bank, spec, x.dtype, int(ids.shape[1]), weights.dtype)
        found.append((site, x.detach().clone(), ids.to(torch.int64), weights.detach().clone()))

    optimized = moeopt.optimize(model, x, verify="off")
    with torch.no_grad(), override_experts_impl(look):
        optimized.model(x)
    (one,) = found
    assert isinstance(one[0].spec, RowFunction)
    return one


@pytest.fixture(scope="module")
def twenty():
    return site_of(20)


def same(site, x, ids, weights):
    feeds = {"x": x, "ids": ids, "weights": weights}
    with torch.no_grad():
        want = experts(x, ids, weights, site.bank, site.spec)
    got = session_of(site, LoopFunction()).run(feeds)[0]
    assert got.shape == want.shape
    eps = torch.finfo(want.dtype).eps * max(1.0, float(want.abs().max()))
    assert float((got - want).abs().max()) <= BUDGET * eps


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_the_numbers_of_the_op(twenty, weight_on):
    site, x, ids, weights = twenty
    site = dataclasses.replace(site, spec=dataclasses.replace(site.spec, weight_on=weight_on))
    same(site, x, ids, weights)
    strange = ids.clone()
    strange[0, 0], strange[1, 1] = -1, 20
    same(site, x, strange, weights)
    same(site, x[:1], torch.tensor([[7, 7]]), weights[:1])


def test_an_expert_that_overflows_does_not_leak_into_tokens_that_did_not_choose_it(twenty):
    site, x, ids, weights = twenty
    bank = site.bank
    large = [t.clone() for t in bank.slots(3)]
    large[0].fill_(float("inf"))

    class Overflows:
        num_experts = bank.num_experts

        def slots(self, e):
            return large if e == 3 else bank.slots(e)

    others = torch.where(ids == 3, 4, ids)
    got = session_of(dataclasses.replace(site, bank=Overflows()), LoopFunction()).run(
        {"x": x, "ids": others, "weights": weights}
    )[0]
    assert torch.isfinite(got).all()


def test_the_graph_does_not_grow_with_the_experts_and_target_rules_hold(twenty):
    counts = []
    for site in (twenty[0], dataclasses.replace(twenty[0], bank=_First(twenty[0].bank, 5))):
        model = one_op(site, LoopFunction())
        model = ir.from_proto(model) if not isinstance(model, ir.Model) else model
        assert check_graph(model, SM_89) == []
        (loop,) = (node for node in model.graph if node.op_type == "Loop")
        inside = [node.op_type for node in loop.attributes["body"].as_graph()]
        assert inside.count("MatMul") + inside.count("Gemm") == 2
        counts.append((len(model.graph), len(inside)))
    assert counts[0] == counts[1]


class _First:
    """The first experts of a bank."""

    def __init__(self, bank, count):
        self._bank, self.num_experts = bank, count

    def slots(self, e):
        return self._bank.slots(e)


def test_the_plan_takes_the_loop_beyond_sixteen_experts(twenty):
    plan = TensorRTPlan(SM_89, open_session=session_of)
    assert plan.choice(twenty[0]).name == "loop_function"
    assert "20 are more than 16" in next(c.reason for c in plan.rank(twenty[0]) if c.name == "dense_function")
    few = dataclasses.replace(twenty[0], bank=_First(twenty[0].bank, 16))
    assert TensorRTPlan(SM_89, open_session=session_of).choice(few).name == "dense_function"
