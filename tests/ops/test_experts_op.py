"""The custom op, as compiled code calls it: on the same weights each time, and on others at their address."""

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts_op, experts_reference, unflatten
from moeopt.ops.experts import flatten
from moeopt.ops.native import again
from moeopt.ops.native.library import library
from tests.ops.cases import make

SPEC = ExpertsSpec(rows="separate")
OP = torch.ops.moeopt.experts


@pytest.fixture(params=(True, False), ids=("stacked", "separate"))
def case(request):
    return make(SPEC, stacked=request.param, dtype=torch.float32)


def right(case, lists):
    x, ids, weights = case.args[:3]
    want = experts_reference(x, ids, weights, unflatten(lists, SPEC), SPEC)
    return torch.allclose(OP(x, ids, weights, *lists, SPEC.text), want, atol=1e-5)


def test_the_second_call_prepares_nothing(case, monkeypatch):
    if library() is None:
        pytest.skip("no native kernel here")
    lists = flatten(case.bank, SPEC)
    want = OP(*case.args[:3], *lists, SPEC.text)
    monkeypatch.setattr(again, "prepared_call", lambda *args: pytest.fail("prepared anew"))
    assert torch.equal(OP(*case.args[:3], *lists, SPEC.text), want)


def test_other_weights_at_the_same_address_are_read_as_they_are(case):
    lists = flatten(case.bank, SPEC)
    w_out = lists[1]
    assert right(case, lists) and right(case, lists)
    for t in w_out:
        t.copy_(t.flip(0))
    assert right(case, lists)
    turned = [t.transpose(-1, -2) if t.shape[-1] == t.shape[-2] else t for t in lists[0]]
    assert right(case, (turned, *lists[1:]))
    signed = [torch._neg_view(t) for t in w_out]
    assert right(case, (lists[0], signed, *lists[2:]))
    assert right(case, lists)


def test_not_too_many_are_known_and_not_those_of_many_weights(case, monkeypatch):
    monkeypatch.setattr(experts_op, "MOST_BANKS", 2)
    monkeypatch.setattr(experts_op, "_calls", {})
    for _ in range(5):
        lists = tuple([t.clone() for t in part] for part in flatten(case.bank, SPEC))
        assert right(case, lists) and len(experts_op._calls) <= 2
    monkeypatch.setattr(experts_op, "MOST_WEIGHTS", 2)
    experts_op._calls.clear()
    assert right(case, lists) and not experts_op._calls
