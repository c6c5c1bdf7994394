"""A steered choice names every expert and holds the scores of what it names."""

import pytest
import torch

from moeopt.capture.force_routing import ForceAllExperts
from moeopt.capture.tape import record
from tests.capture.tiny import Run, rand

E = 12


def one_sided(t):
    """Scores that choose expert 0 alone."""
    scores = rand(t, E)
    scores[:, 0] += 100
    return scores


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_takes_all_experts_in_turn_and_none_twice(k):
    tape = record(Run(lambda _, s: s.topk(k)), (one_sided(2 * E),), steer=ForceAllExperts(E, 0))
    values, ids = (tape.value(n) for n in tape.output)
    assert set(ids.flatten().tolist()) == set(range(E)) and all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(values, one_sided(2 * E).gather(-1, ids))


@pytest.mark.parametrize(
    "choose",
    [
        lambda s: s.argmax(-1),
        lambda s: s.max(-1).indices,
        lambda s: s.max(-1, keepdim=True)[1],
        lambda s: s.t().argmax(0),
        lambda s: s.t().topk(1, dim=0)[1],
        lambda s: s.view(3, -1, E).topk(2)[1],
    ],
)
def test_every_form_of_choice_is_steered(choose):
    seen = []

    def chosen(_, scores):
        seen.append(choose(scores))
        return seen[-1]

    tape = record(Run(chosen), (one_sided(2 * E),), steer=ForceAllExperts(E, 0))
    ids, plain = tape.value(tape.output), choose(one_sided(2 * E))
    assert set(ids.flatten().tolist()) == set(range(E)) and ids.shape == plain.shape and ids.dtype == plain.dtype
    assert torch.equal(seen[0], ids)  # what follows the choice sees it too


def test_a_choice_among_something_else_is_left_alone():
    scores = rand(5, E + 1)
    tape = record(Run(lambda _, s: (s.topk(2)[1], s.argmax(), s.argmax(-1, keepdim=True), s.sum(-1))), (scores,),
                  steer=ForceAllExperts(E, 0))  # fmt: skip
    got = [tape.value(n) for n in tape.output]
    assert torch.equal(got[0], scores.topk(2)[1]) and int(got[1]) == int(scores.argmax())
    assert torch.equal(got[2], scores.argmax(-1, keepdim=True))


def test_the_seed_decides():
    first, same, other = (ForceAllExperts(E, s)._steered(one_sided(9), -1, 2, None)[1] for s in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)
