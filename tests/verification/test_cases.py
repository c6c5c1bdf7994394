"""The adversarial cases are what their names say, for every kind of call."""

import pytest
import torch

from moeopt.capture.call_roles import ArgRole, CallSpec
from moeopt.errors import UsageError
from moeopt.verification.cases import adversarial_cases
from tests.verification.tiny import seeded

E, K, H = 16, 2, 8
NAMES = [
    "every expert",
    "one token",
    "one expert",
    "few experts, ragged",
    "exact ties",
    "extreme magnitudes",
    "nan and inf rows",
    "a nan row alone",
    "many tokens",
]


def by_name(call_spec, **kwargs):
    return {case.name: case for case in adversarial_cases(call_spec, E, **kwargs)}


def batch(dtype=torch.float32):
    return CallSpec(
        (seeded(2, 3, H, dtype=dtype), "eager"), {"flag": True}, (ArgRole("tokens", 2), ArgRole(), ArgRole())
    )


def test_levels():
    assert list(by_name(batch())) == NAMES
    assert list(by_name(batch(), level="fast")) == NAMES[:3]
    assert by_name(batch(), level="off") == {}


def test_arrangements_of_a_batch():
    cases = by_name(batch())
    x = {name: case.args[0] for name, case in cases.items()}
    assert all(case.args[1] == "eager" and case.kwargs == {"flag": True} for case in cases.values())
    assert x["every expert"].shape == (2, 32, H)
    assert x["one token"].shape == (1, 1, H)
    assert (x["one expert"] == x["one expert"][:, :1]).all() and x["one expert"].shape[1] > 1
    assert x["few experts, ragged"].shape == (3, 5, H)
    assert torch.equal(x["few experts, ragged"].view(-1, H)[-2:], x["few experts, ragged"].view(-1, H)[:2])
    assert (x["exact ties"] == 0).all(-1).sum() == 3
    assert x["nan and inf rows"].isnan().any(-1).sum() == 1 and x["nan and inf rows"].isinf().any(-1).sum() == 1
    assert x["a nan row alone"].shape == (1, 1, H) and x["a nan row alone"].isnan().all()
    assert x["extreme magnitudes"].abs().amax() > 100


def test_half_of_many_tokens_go_to_one_choice_of_experts():
    x = by_name(batch())["many tokens"].args[0]
    assert x.shape == (1, 521, H)
    _, counts = x[0].unique(dim=0, return_counts=True)
    assert counts.max() >= 260 and len(counts) > 128
    assert list(by_name(batch(), max_tokens=200)) == NAMES and list(by_name(batch(), max_tokens=127)) == NAMES[:-1]
    assert by_name(batch(), max_tokens=200)["many tokens"].args[0].shape == (1, 200, H)


def test_the_prototype_is_not_written():
    call_spec = batch()
    before = call_spec.args[0].clone()
    by_name(call_spec)
    assert torch.equal(before, call_spec.args[0])


def test_seeded():
    one, two, three = (by_name(batch(), seed=s)["every expert"].args[0] for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_finite_where_they_should(dtype):
    for name, case in by_name(batch(dtype)).items():
        assert case.args[0].dtype == dtype
        assert case.args[0].isfinite().all() or name in ("nan and inf rows", "a nan row alone")


def experts_call():
    args = (seeded(6, H), torch.arange(12).view(6, 2) % E, seeded(6, K).softmax(-1))
    return CallSpec(args, {}, (ArgRole("tokens", 1), ArgRole("ids", 1), ArgRole("weights", 1)))


def test_ids_are_decided():
    ids = {name: case.args[1] for name, case in by_name(experts_call()).items()}
    assert len(ids["every expert"].unique()) == E
    assert len(ids["one expert"][:, 0].unique()) == 1
    assert len(ids["few experts, ragged"].unique()) == 2
    assert all((row[:, 0] != row[:, 1]).all() and row.dtype == torch.long for row in ids.values())
    assert all((row >= 0).all() and (row < E).all() for row in ids.values())


def test_router_rows_are_mixed_in():
    rows = 100 + seeded(E, H)
    x = by_name(batch(), router_rows=rows)["every expert"].args[0].view(-1, H)
    assert all((x == row).all(-1).any() for row in rows)


def test_maps_with_features_on_axis_1():
    call_spec = CallSpec((seeded(2, 5, 3, 4),), {}, (ArgRole("tokens", 3, feature_axis=1),))
    assert call_spec.grid == (2, 3, 4)
    cases = by_name(call_spec)
    assert cases["one token"].args[0].shape == (1, 5, 1, 1)
    assert cases["few experts, ragged"].args[0].shape == (1, 5, 3, 5)
    same = call_spec.with_tokens((2, 3, 4))[0][0]
    assert torch.equal(same, call_spec.args[0])


def test_flat_leaves_beside_a_grid_go_along():
    x, mask, tag = seeded(2, 3, H), torch.arange(6) % 2 == 0, torch.arange(6).view(2, 3)
    call_spec = CallSpec(
        (x,), {"mask": mask, "tag": tag}, (ArgRole("tokens", 2), ArgRole("static", 1), ArgRole("static", 2))
    )
    args, kwargs = call_spec.with_tokens((4, 2))
    assert kwargs["mask"].shape == (8,) and kwargs["tag"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert torch.equal(args[0].view(-1, H)[5], x.view(-1, H)[5])


@pytest.mark.parametrize(
    ("leaves", "reason"),
    [
        ((ArgRole("tokens", 2),), "the call has 2 leaves, 1 roles were given"),
        ((ArgRole(), ArgRole()), "no argument has token dims"),
        ((ArgRole("tokens", 2), ArgRole("ids", 1)), r"token dims \(5,\), which do not fit the grid \(2, 3\)"),
    ],
)
def test_roles_that_do_not_fit(leaves, reason):
    with pytest.raises(UsageError, match=reason):
        CallSpec((seeded(2, 3, H), torch.zeros(5, K)), {}, leaves)


def test_token_counts_that_do_not_fit():
    with pytest.raises(UsageError, match="2 token dims"):
        batch().with_tokens((4,))
    with pytest.raises(UsageError, match="given 3 rows for 4 tokens"):
        batch().with_tokens((2, 2), {0: torch.zeros(3, H)})
