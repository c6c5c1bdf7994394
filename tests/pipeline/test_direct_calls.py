"""A block inside a model, called with ids that its router never gives it: the original's numbers or its error."""

import copy

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from tests.helpers import assert_same

H, E, K = 8, 4, 2


class Experts(nn.Module):
    """Takes ids; one below 0 counts from the last expert, one from E on is an error."""

    def __init__(self):
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(E, H, 12) / 3)
        self.w_out = nn.Parameter(torch.randn(E, 12, H) / 3)

    def forward(self, rows, ids, weights):
        hidden = torch.einsum("th,tkhi->tki", rows, self.w_in[ids])
        return (torch.einsum("tki,tkih->tkh", hidden.relu(), self.w_out[ids]) * weights[..., None]).sum(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E), Experts()

    def forward(self, x):
        rows = x.reshape(-1, H)
        weights, ids = self.gate(rows).softmax(-1).topk(K)
        return self.experts(rows, ids, weights).view(x.shape)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 5, H)
    done = moeopt.optimize(copy.deepcopy(model), x, verify="fast")
    return model, done.model, x


def arguments(ids):
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, H, generator=g), torch.tensor(ids), torch.rand(3, K, generator=g)


def test_calls_as_the_router_makes_them_run_the_rewritten_code(pair):
    model, twin, x = pair
    names = [name for name, m in twin.named_modules() if "forward" in m.__dict__]
    assert names == ["experts"], "the block is the inner module"
    before = twin.experts.forward.fallbacks
    assert_same(twin(x), model(x))
    call = arguments([[0, 3], [1, 2], [3, 0]])
    assert_same(twin.experts(*call), model.experts(*call))
    assert twin.experts.forward.fallbacks == before


def test_ids_that_wrap_give_the_originals_numbers(pair):
    model, twin, _ = pair
    call = arguments([[0, -1], [1, 2], [-4, 0]])
    with pytest.warns(StaleModelWarning, match="ids from -4 to 2, and the model around it gives it 0 to 3 only"):
        got = twin.experts(*call)
    assert torch.equal(got, model.experts(*call))


def test_ids_beyond_the_experts_give_the_originals_error(pair):
    model, twin, _ = pair
    call = arguments([[0, 4], [1, 2], [3, 0]])
    with pytest.raises(IndexError) as wanted:
        model.experts(*call)
    with pytest.warns(StaleModelWarning, match="ids from 0 to 4"), pytest.raises(IndexError) as got:
        twin.experts(*call)
    assert str(got.value) == str(wanted.value)


def test_the_guard_holds_in_copies_and_not_where_values_are_unknown(pair):
    _, twin, x = pair
    again = copy.deepcopy(twin)
    with pytest.warns(StaleModelWarning):
        again.experts(*arguments([[0, -1], [1, 2], [3, 0]]))
    program = torch.export.export(twin, (x,), strict=False)
    assert "aminmax" not in str(program.graph)
