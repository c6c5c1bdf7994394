"""Experts under other numbers than 0, 1, 2: the numbers are looked up, and one that names none is the model's own."""

import pytest
import torch

import moeopt
from moeopt.recognise.named_ids import are_named, places_of
from moeopt.recognise.routing_types import Extraction
from tests.zoo.whose_experts import D, NamedByDomain


def test_places_of_numbers():
    named = torch.tensor([[5, 0], [2, 5], [1, -3]])
    assert places_of(named, [0, 2, 5]).tolist() == [[2, 0], [1, 2], [3, 3]]
    assert places_of(named.int(), [0, 2, 5]).dtype == torch.int64
    assert are_named(Extraction(None, [(places_of, ([0, 2],))])) and not are_named(None)
    assert not are_named(Extraction(None, [(torch.t, ())]))


@pytest.fixture(scope="module")
def optimised():
    torch.manual_seed(0)
    model = NamedByDomain().eval()
    return model, moeopt.optimize(model, (torch.randn(6, D), torch.tensor([0, 2, 5, 5, 2, 0])))


@pytest.mark.parametrize("domain", [[0] * 6, [5, 5, 0, 0, 2, 2], [2, 0, 2, 0, 2, 0]])
def test_any_of_the_numbers_may_come(optimised, domain):
    model, opt = optimised
    assert opt.report.blocks[0].status == "rewritten"
    x = torch.randn(6, D)
    torch.testing.assert_close(opt(x, torch.tensor(domain)), model(x, torch.tensor(domain)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [1, 3, -1, 7])
@pytest.mark.filterwarnings("ignore::moeopt.errors.StaleModelWarning")
def test_another_number_is_what_the_model_makes_of_it(optimised, number):
    _, opt = optimised
    with pytest.raises(KeyError, match=str(number)):
        opt(torch.randn(6, D), torch.tensor([0, 2, 5, number, 2, 0]))


def test_experts_that_the_example_leaves_out_are_missed():
    torch.manual_seed(0)
    report = moeopt.explain(NamedByDomain().eval(), (torch.randn(4, D), torch.tensor([0, 2, 2, 0])))
    assert report.blocks[0].status == "declined"
    assert "experts.5.0.weight" in report.blocks[0].reason and "every expert" in report.blocks[0].reason
