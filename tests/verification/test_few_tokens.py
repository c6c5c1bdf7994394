"""Calls of few tokens: which experts they share, and that results are compared."""

import pytest
import torch

from moeopt.capture.call_roles import ArgRole, CallSpec
from moeopt.verification.few_tokens import ROWS, FewTokens, unlike
from moeopt.verification.results import Case
from tests.toy_moe import E, H, K, build


def calls(count=48, numbers=(), as_told=lambda ids: ids):
    """By their names, the counts of each expert's tokens in the calls for the toy block, and their ids.

    Args:
        as_told: the form in which the op gets its ids.
    """
    block = build()
    few = FewTokens(
        CallSpec((torch.randn(24, H),), {}, (ArgRole("tokens", 1),)),
        E,
        numbers,
        block.gate.weight.detach(),
        K,
        count,
        0,
    )
    assert len(few.all_rows.args[0]) == ROWS
    ids = block.route(few.all_rows.args[0])[0]
    found = {}
    for case in few.cases(as_told(ids)):
        own = block.route(case.args[0])[0]
        found.setdefault(case.name, []).append((own.flatten().bincount(minlength=E).tolist(), own))
    assert sum(map(len, found.values())) == count
    return found


def table(ids):
    """(T, E): an expert that a token did not choose is named E, as of a mask over the experts."""
    every = torch.arange(E)
    return torch.where((ids.unsqueeze(-1) == every).any(1), every, E)


def padded(ids):
    return torch.cat([torch.full_like(ids[:, :1], -1), ids], 1)


@pytest.mark.parametrize("as_told", [lambda ids: ids, table, padded], ids=["chosen", "table", "padded"])
def test_tokens_share_experts_in_every_way(as_told):
    found = calls(as_told=as_told)
    assert all(len(set(counts)) == 1 for counts, _ in found["tokens for every expert alike"])
    within = [counts for counts, _ in found["tokens of some of the experts"]]
    assert any(c[2:] == [0, 0] for c in within) and any(c[:2] == [0, 0] for c in within)
    for number in (0, E - 1):
        assert any(c[number] == 0 and sum(map(bool, c)) == E - 1 for c in within)
    first = (lambda ids: ids.min(1).values) if as_told is table else (lambda ids: ids[:, 0])
    orders = [first(ids).tolist() for _, ids in found["tokens in the order of their experts"]]
    assert [sorted(o) == o for o in orders] == [True, False] and sorted(orders[1], reverse=True) == orders[1]
    assert {len(ids) for _, ids in found["a few tokens"]} >= {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("number", [5, 29])
def test_an_expert_has_as_many_tokens_as_a_number_in_the_code(number):
    most = {
        max(counts)
        for name, own in calls(numbers=[number]).items()
        if name.startswith("one token")
        for counts, _ in own
    }
    assert most >= {number - 1, number, number + 1}


@pytest.mark.parametrize("count", [8, 9])
def test_there_are_as_many_calls_as_asked_for(count):
    assert len(calls(count)) == 6  # of every kind, with two names of those of one token


def test_only_results_that_are_not_close_are_told():
    x = torch.ones(3, 4)
    cases = [Case("one", (x,)), Case("two", (2 * x,)), Case("none", (0 * x,))]

    def told(rewritten):
        return [case.name for case in unlike(lambda t: (t, 1.0), rewritten, cases)]

    assert told(lambda t: (t * (1 + 1e-7), 1.0)) == []
    assert told(lambda t: (t * (1 + 1e-5 * (t.sum() > 20)), 1.0)) == ["two"]
    assert told(lambda t: (t, 1.5)) == told(lambda t: (t.double(), 1.0)) == told(lambda t: t) == ["one", "two", "none"]
    assert told(lambda t: (t / t, 1.0)) == ["two", "none"]

    def raises(t):
        raise RuntimeError("no")

    assert told(raises) == ["one", "two", "none"]
    assert list(unlike(raises, lambda t: t, cases)) == []


def test_one_token_of_each_set_of_experts_is_called_alone():
    block = build()
    role = CallSpec((torch.randn(24, H),), {}, (ArgRole("tokens", 1),))
    few = FewTokens(role, E, (), block.gate.weight.detach(), K, 48, 0)
    ids = block.route(few.all_rows.args[0])[0]
    alone = [block.route(case.args[0])[0] for case in few.alone(ids)]
    assert all(len(own) == 1 for own in alone)
    found = [frozenset(own[0].tolist()) for own in alone]
    assert set(found) == {frozenset(row) for row in ids.tolist()} and len(found) == len(set(found)) > 4
    assert len(list(FewTokens(role, E, (), None, K, 2, 0).alone(ids))) == 4
    assert not list(few.alone(None)) and not list(few.alone(ids[:5]))
