"""The proof across ranks finds what dispatch, weights and sums can do wrong: each is damaged on purpose."""

import dataclasses

import pytest
import torch

import moeopt
from moeopt.distributed import dispatch, install
from moeopt.distributed.agreed_ids import flips
from moeopt.distributed.agreement import digest
from moeopt.distributed.homes import ExpertHomes
from moeopt.distributed.proof import part_of
from moeopt.errors import NotEquivalentError
from tests.distributed.models import optimised, tokens


def exchanged(numbers):
    """Two experts' numbers exchanged, as where a global id is taken for a local one."""
    return torch.where(numbers == 0, 1, torch.where(numbers == 1, 0, numbers))


def wrong_numbers(monkeypatch):
    right = ExpertHomes.numbers_at
    monkeypatch.setattr(ExpertHomes, "numbers_at", lambda self, ids, rank: exchanged(right(self, ids, rank)))


def lost_term(monkeypatch):
    right = dispatch.summed

    def wrong(term_SD, *rest):
        return right(term_SD * (torch.arange(len(term_SD)) > 0).unsqueeze(1), *rest)

    monkeypatch.setattr(dispatch, "summed", wrong)


def wrong_weights(monkeypatch):
    right = install.local_refs
    monkeypatch.setattr(install, "local_refs", lambda refs, weights, own: right(refs, weights, own)[::-1])


def wrong_function(monkeypatch):
    """One op's experts run with another activation: dispatch and weights are right, and the numbers are not."""
    from moeopt.distributed import forward

    right = forward.partial_sums
    monkeypatch.setattr(
        forward, "partial_sums", lambda spec, dtype: dataclasses.replace(right(spec, dtype), activation="relu")
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (wrong_numbers, "tokens that were sent to tagged experts differ on rank 0: in the case"),
        (lost_term, "tokens that were sent to tagged experts differ on rank 0: in the case"),
        (wrong_weights, "the weights of its experts differ on rank 0: its number 0 is not expert 0"),
        (
            wrong_function,
            "numbers of the case 'as routed' (4 times the distance of one process) differ on rank 0: token",
        ),
    ],
)
def test_damage_is_found(alone, monkeypatch, damage, words):
    opt = optimised()
    damage(monkeypatch)
    with pytest.raises(NotEquivalentError) as err:
        moeopt.distribute(opt, alone)
    assert words in str(err.value) and "The model was not distributed" in str(err.value)


def test_other_weights_dtypes_and_orders_have_other_digests():
    x = torch.arange(12.0)
    others = [x.flip(0), x.view(3, 4), x.double(), x.bfloat16(), x + 1e-6, x[:11]]
    assert len({digest(t) for t in (x, *others)}) == 7 and digest(x) == digest(x.clone())
    assert digest(torch.tensor([True, False])) != digest(torch.tensor([False, True]))


def test_the_parts_of_the_ranks_are_all_tokens_once():
    for number in range(4):
        for size in (1, 2, 3, 4):
            taken = [t for rank in range(size) for t in range(11)[part_of(11, rank, size, number)]]
            assert taken == list(range(11)), (number, size)


def test_a_near_tie_is_no_flip():
    ids, other = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 2], [2, 0]])
    near = torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    far = torch.tensor([[0.5, 0.25 + 1e-7], [0.4, 0.25]])
    assert flips(ids, other, near, far, eps=2**-23).tolist() == [False, True]
    assert not flips(ids, ids, near, far, eps=2**-23).any()


def test_routers_that_look_at_other_tokens_are_told(alone):
    from tests.toy_moe import Block

    class Centred(Block):
        """Its router takes the batch's mean away."""

        def route(self, x):
            return super().route(x - x.mean(0))

    opt = optimised(Centred)
    notes = " ".join(moeopt.distribute(opt, alone).certificate.notes)
    assert (
        "so its router looks at more than one: each rank computes what the model computes of that rank's own" in notes
    )
    notes = " ".join(moeopt.distribute(optimised(), alone).certificate.notes)
    assert "looks at more than one" not in notes
    assert tokens(3).shape == (3, 16)
