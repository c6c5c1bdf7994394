"""Ties told from flips, choices made again, and budgets that cannot allow anything."""

import pytest
import torch
from torch import nn

from moeopt.verification.model import CEILING, compare_outputs, end_to_end
from moeopt.verification.pins import RoutingLog, RoutingPins
from moeopt.verification.ties import RoutedCall, _pins, differing, exactly_tied, in_place_of, tied_tokens

EPS = torch.finfo(torch.float32).eps


def choice(scores: torch.Tensor, k: int = 2) -> RoutedCall:
    """What a top-k of ``scores`` gives a site."""
    log = RoutingLog()
    with log:
        weights, ids = scores.topk(k)
    return RoutedCall("site", ids, weights, log.events)


@pytest.mark.parametrize(
    ("row", "tied", "exact"),
    [
        ([0.1, 0.4, 0.3, 0.2], False, False),
        ([0.1, 0.4, 0.2, 0.2], True, True),  # the second of two is one of two equals
        ([0.4, 0.4, 0.2, 0.1], False, False),  # both equals are chosen
        ([0.1, 0.4, 0.2, 0.2 + 2 * EPS * 0.2], True, False),  # as near as rounding
        ([0.1, 0.4, 0.2, 0.2001], False, False),
        ([0.25, 0.25, 0.25, 0.25], True, True),
        ([1.0, 0.0, 0.0, 0.0], True, False),  # equal, and of no weight
    ],
)
def test_a_tie_is_at_the_edge_of_the_choice_and_matters(row, tied, exact):
    found = tied_tokens(choice(torch.tensor([row])), EPS)
    assert (found[0].item(), found[1].item()) == (tied, exact)
    assert exactly_tied(choice(torch.tensor([row])).events) is (exact or row[0] == 1.0)


@pytest.mark.parametrize("ids", [[[0, 2]], [[0, 3, 4, 4]], [[4, 4, 3, 0]]])
def test_the_edge_of_a_whole_order_is_that_of_what_its_site_takes_of_it(ids):
    scores = torch.tensor([[0.3, 0.1, 0.2, 0.2]])
    log = RoutingLog()
    with log:
        scores.sort(dim=-1, descending=True, stable=True)
    ids = torch.tensor(ids)  # 4: no expert
    found = RoutedCall("site", ids, torch.where(ids < 4, 0.5, 0.0), log.events)
    assert [one.item() for one in tied_tokens(found, EPS)] == [True, True]
    alone = RoutedCall("site", torch.tensor([[0, 4, 4, 4]]), torch.tensor([[0.5, 0.0, 0.0, 0.0]]), log.events)
    assert [one.item() for one in tied_tokens(alone, EPS)] == [False, False]


def test_scores_that_move_under_noise_widen_what_is_a_tie():
    still, shaken = torch.tensor([[0.1, 0.4, 0.2, 0.2001]]), torch.tensor([[0.1, 0.4, 0.2, 0.2002]])
    assert not tied_tokens(choice(still), EPS, [choice(still)])[0].any()
    assert tied_tokens(choice(still), EPS, [choice(shaken)])[0].all()


def test_a_choice_that_noise_changes_is_a_tie_whatever_made_it():
    one = RoutedCall("site", torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), [])
    other = RoutedCall("site", torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), [])
    assert tied_tokens(one, EPS, [other])[0].all() and not tied_tokens(one, EPS, [one])[0].any()


def test_experts_of_no_weight_do_not_differ_and_broken_tokens_choose_nothing():
    found = RoutedCall(
        "site", torch.tensor([[0, 1], [0, 1], [0, 1]]), torch.tensor([[1.0, 0], [0.6, 0.4], [torch.nan] * 2]), []
    )
    assert differing(found, torch.tensor([[0, 3], [0, 3], [2, 3]])).tolist() == [False, True, False]


def test_other_experts_take_the_places_of_those_that_are_not_named():
    own, other = torch.tensor([[6, 5], [1, 2], [3, 4]]), torch.tensor([[0, 1], [2, 7], [4, 3]])
    assert in_place_of(own, other).tolist() == [[0, 1], [7, 2], [3, 4]]


class Tied(nn.Module):
    """A gate with equal rows: every token's choice is a tie that noise would break."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.experts = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 32)
        with torch.no_grad():
            self.gate.weight[2:], self.gate.bias[2:] = self.gate.weight[:2], self.gate.bias[:2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        weight, ids = self.gate(x).softmax(-1).max(-1)
        each = self.experts(x).view(-1, 4, 8)
        return each[torch.arange(len(x)), ids] * weight[:, None]


def test_noise_does_not_choose_experts():
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(20, 8)
    result = end_to_end(model, model, (x,), noise_blocks=["first", "gate"])
    assert result.passed and 0 < result.budget < 1e-4

    def other(x):
        y = model(x)
        return torch.cat([y[:10], -y[10:]])

    assert "explains" in end_to_end(model, other, (x,), noise_blocks=["first", "gate"]).reason


def test_pins_end_where_the_code_takes_another_way():
    x = torch.tensor([[0.1, 0.3, 0.2]])
    log = RoutingLog()
    with log:
        x.topk(1)
    with RoutingPins(log.events):
        assert (x.flip(-1)).topk(1)[1].item() == 1 and (-x).topk(1)[1].item() == 0
    with RoutingPins(log.events):
        assert (-x).topk(1)[1].item() == 1 and (-x).topk(1)[0].item() == pytest.approx(-0.1)
    with RoutingPins(log.events):
        assert (-x).argmax(-1).item() == 0 and (-x).topk(1)[1].item() == 0


def test_a_budget_that_allows_anything_is_no_verdict():
    want = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    wild = want.clone()
    wild[0] *= -1
    some = compare_outputs(want, want, [wild])
    assert some.passed and some.tokens == 5 and some.budget < CEILING
    (note,) = some.notes
    assert note.startswith("1 of 6 tokens were not judged: one rounding error in each block moves")
    none = compare_outputs(want, want, [-want])
    assert none.passed is False and "cannot be judged" in none.reason and "every one of its 6 tokens" in none.reason
    wrong = want.clone()
    wrong[3] *= 1.1
    assert "moves by 0.1 at its worst token" in compare_outputs(want, wrong, [wild]).reason


def test_a_run_goes_on_with_other_choices_and_tells_its_own():
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.1, 0.2]])
    log = RoutingLog({0: lambda own: own.new_tensor([[2], [1]])})
    with log:
        values, ids = scores.topk(1)
        rest = scores.argmax(-1)
    assert ids.flatten().tolist() == [2, 1] and values.flatten().tolist() == pytest.approx([0.2, 0.1])
    assert log.events[0].ids.flatten().tolist() == [1, 0] and rest.tolist() == [1, 0]


def test_the_first_of_more_choices_are_pinned_and_what_they_displace_stands_behind():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.4, 0.3, 0.2]])
    log = RoutingLog()
    with log:
        _, best = scores.topk(3)
    own = RoutedCall("site", best[:, :2].clone(), torch.ones(2, 2), log.events)
    other = torch.tensor([best[0, [2, 0]].tolist(), best[1, :2].tolist()])
    pins = _pins([own], {"site": other})
    with RoutingLog(pins):
        _, pinned = scores.topk(3)
    assert sorted(pinned[0].tolist()) == sorted(best[0].tolist()), "each expert still stands once"
    assert set(pinned[0, :2].tolist()) == set(other[0].tolist())
    assert torch.equal(pinned[1], best[1])
    assert not _pins([own], {"site": other[:1]}), "ids of other tokens pin nothing"
