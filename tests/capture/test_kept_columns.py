"""Columns of whole numbers in a table of floats keep values of the example where rows at random do not run."""

import dataclasses

import torch

from moeopt.capture.call_roles import ArgRole, CallSpec
from moeopt.capture.probe_inputs import call_specs, probe_call
from moeopt.verification.cases import adversarial_cases

TABLE = torch.cat([torch.tensor([[3.0], [7.0], [7.0], [11.0]]), torch.randn(4, 3), torch.ones(4, 1)], 1)
PLAIN = CallSpec((TABLE,), {}, (ArgRole("tokens", 1),))
KEPT = dataclasses.replace(PLAIN, kept_columns=True)


def test_only_columns_of_whole_numbers_may_be_ids():
    assert PLAIN.has_whole_columns()
    assert not CallSpec((torch.randn(4, 3),), {}, (ArgRole("tokens", 1),)).has_whole_columns()


def test_every_probe_and_every_case_keeps_the_values_of_each_column():
    calls = [
        *(probe_call(KEPT, 40, 0, paired=pairs)[0] for pairs in (False, True)),
        *(c.args for c in adversarial_cases(KEPT, 4)),
    ]
    for (x,) in calls:
        assert set(x[:, 0].tolist()) <= {3.0, 7.0, 11.0} and bool((x[:, 4] == 1).all())
    assert {3.0, 7.0, 11.0} == set(calls[0][0][:, 0].tolist())
    assert not torch.isin(calls[0][0][:, 1:4], TABLE).any()  # the others are new


def test_without_need_columns_are_like_any_other():
    (x,), _ = probe_call(PLAIN, 40, 0)
    assert not (x[:, 0] == x[:, 0].round()).all()


IDS = torch.tensor([4, 9, 9, 30])


def test_integers_with_gaps_keep_values_of_the_example():
    spec = CallSpec((torch.randn(4, 3), IDS), {}, (ArgRole("tokens", 1), ArgRole("static", 1)))
    assert spec.has_whole_columns()
    (_, free), _ = probe_call(spec, 200, 0)
    assert set(free.tolist()) == set(range(4, 31))
    kept = dataclasses.replace(spec, kept_columns=True)
    cases = [c.args for c in adversarial_cases(kept, 4) if "turned" not in c.name]
    for _, ids in [probe_call(kept, 200, 0)[0], *cases]:
        assert set(ids.tolist()) <= {4, 9, 30} and ids.dtype == IDS.dtype
    assert set(probe_call(kept, 40, 0)[0][1].tolist()) == {4, 9, 30}
    near = CallSpec((torch.randn(3, 3), torch.arange(3)), {}, (ArgRole("tokens", 1), ArgRole("static", 1)))
    assert not near.has_whole_columns()


def test_tokens_in_pairs_are_nearly_the_same_and_name_the_same_experts():
    """Both rows of a pair reach an expert, and stay two rows in bfloat16."""
    spec = next(call_specs((torch.randn(6, 8, dtype=torch.bfloat16), torch.tensor([[0, 3], [1, 2]] * 3)), {}))
    (x, ids), _ = probe_call(spec, 13, 0, experts=4, paired=True)
    assert x.shape == (13, 8) and x.dtype == torch.bfloat16
    assert torch.equal(ids[0:12:2], ids[1:12:2])
    apart = (x[0:12:2] - x[1:12:2]).float().norm(dim=-1) / x[0:12:2].float().norm(dim=-1)
    assert bool((apart > 0).all() and (apart < 0.05).all())
    assert len(x[::2].unique(dim=0)) == 7
