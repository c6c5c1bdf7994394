"""How a call is read as tokens, and the inputs that are made from it."""

import pytest
import torch

from moeopt.capture.probe_inputs import aimed_rows, call_specs, probe_call
from moeopt.errors import Declined
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, seeded

X = rand(2, 5, H)


def first(*args, **kwargs):
    return next(call_specs(args, kwargs))


def test_the_likeliest_reading_comes_first():
    readings = list(call_specs((X,), {}))
    assert [(p.leaves[0].role, p.leaves[0].lead, p.leaves[0].feature_axis) for p in readings] == [
        ("tokens", 2, -1), ("tokens", 2, 1), ("tokens", 1, -1),
    ]  # fmt: skip
    assert [p.grid for p in readings] == [(2, 5), (2, H), (2,)]
    assert [p.grid for p in call_specs((rand(7, H),), {})] == [(7,)]
    assert first(rand(2, H, 3, 4)).grid == (2, H, 3)


def test_other_arguments_go_with_the_tokens_they_fit():
    call_spec = first(
        X, torch.zeros(10, 2, dtype=torch.long), weights=rand(2, 5, 2), flat=rand(10, H), mask=torch.ones(2, 5).bool(),
        scale=torch.tensor(2.0), table=rand(3, 3), flag=True,
    )  # fmt: skip
    roles = dict(zip(("x", "ids", "weights", "flat", "mask", "scale", "table", "flag"), call_spec.leaves, strict=True))
    assert {k: (v.role, v.lead) for k, v in roles.items()} == {
        "x": ("tokens", 2), "ids": ("ids", 1), "weights": ("weights", 2), "flat": ("tokens", 1), "mask": ("static", 2),
        "scale": ("static", 0), "table": ("static", 0), "flag": ("static", 0),
    }  # fmt: skip


def test_token_ids_alone_count_tokens_on_every_axis():
    call_spec = first(torch.randint(100, (2, 6)))
    assert call_spec.grid == (2, 6) and call_spec.leaves[0].role == "static"
    (ids,), _ = probe_call(call_spec, 40, 0)
    assert ids.dtype == torch.int64 and ids.numel() >= 40 and ids.min() >= 0 and ids.max() < 100


def test_a_call_without_tokens_is_declined():
    with pytest.raises(Declined, match="it is called without a tensor of tokens, so it cannot be probed"):
        first(3, flag=True)
    with pytest.raises(Declined, match="it is called without a tensor of tokens"):
        first(torch.tensor(1))


def test_a_witness_has_a_shape_of_its_own_at_the_scale_of_the_real_rows():
    call_spec = first(X * 100, mask=torch.ones(2, 5).bool())
    (x,), kwargs = probe_call(call_spec, 48, 0)
    assert x.shape[-1] == H and x.shape[:2] != (2, 5) and x.shape[0] * x.shape[1] >= 48
    assert kwargs["mask"].shape == x.shape[:2] and kwargs["mask"].dtype == torch.bool
    assert 50 < x.square().mean().sqrt() < 200 and x.dtype == X.dtype
    assert torch.unique(x.view(-1, H), dim=0).shape[0] == x.shape[0] * x.shape[1]
    (flat,), _ = probe_call(call_spec, 48, 0, flat=True)
    assert flat.shape == (24, 2, H)


def test_witnesses_differ_by_seed_alone():
    call_spec = first(X)
    a, b, c = (probe_call(call_spec, 20, s)[0][0] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_rows_of_zeros_nan_and_half_are_read():
    for rows in (torch.zeros(4, H), torch.full((4, H), float("nan")), rand(4, H).half(), rand(0, H)):
        (x,), _ = probe_call(next(call_specs((rows,), {})), 14, 0)
        assert x.dtype == rows.dtype and x.isfinite().all() and x.abs().max() > 0 and len(x) == 14


@pytest.mark.parametrize(("experts", "slots"), [(4, 2), (5, 1), (3, 3), (2, 4)])
def test_ids_cover_every_expert_and_no_row_names_one_twice(experts, slots):
    call_spec = first(rand(6, H), torch.zeros(6, slots, dtype=torch.int32))
    (_, ids), _ = probe_call(call_spec, 20, 0, experts=experts)
    assert ids.shape == (20, slots) and ids.dtype == torch.int32 and set(ids.flatten().tolist()) == set(range(experts))
    if slots <= experts:
        assert all(len(set(row)) == slots for row in ids.tolist())


def test_a_router_of_the_experts_shape_is_told_by_what_the_experts_read():
    module = torch.nn.ModuleDict({name: torch.nn.Linear(H, H, bias=False) for name in ("a", "b", "router")})
    assert aimed_rows(module, H) is None
    assert torch.equal(aimed_rows(module, H, {"a.weight", "b.weight"}), module["router"].weight)


def test_aimed_rows_are_the_routers():
    module = seeded(MoE)
    rows = aimed_rows(module, H)
    assert torch.equal(rows, module.router.weight) and aimed_rows(module, 99) is None
    (x,), _ = probe_call(first(rand(6, H)), 24, 0, aimed=rows)
    likest = torch.nn.functional.cosine_similarity(x[:, None], rows[None], dim=-1).amax(-1)
    assert (likest[:4] > 0.95).all()


def test_maps_keep_their_features_on_axis_one():
    call_spec = list(call_specs((rand(2, H, 3, 4),), {}))[1]
    (x,), _ = probe_call(call_spec, 30, 0)
    assert x.shape[1] == H and x.dim() == 4 and x.is_contiguous()


def test_masks_over_experts_are_choices():
    mask = torch.nn.functional.one_hot(torch.tensor([1, 3, 0, 2]), 5)
    x, weights = rand(4, H), rand(4, 1)
    for given in (mask, mask.bool(), mask[:, None].int()):
        call_spec = first(x, given, weights)
        assert [leaf.role for leaf in call_spec.leaves] == ["tokens", "choices", "weights"]
        assert call_spec.slots(1) == 2  # one, and one more: a mask may name any number
        _, rows, _ = probe_call(call_spec, 30, 0)[0]
        assert rows.dtype == given.dtype and rows.shape[1:] == given.shape[1:]
        named = rows.reshape(len(rows), 5).long()
        assert named.any(0).all() and named.sum(1).min() == 1 and named.sum(1).max() == 2
    assert first(x, torch.ones(4, 5).long(), weights).leaves[1].role == "ids"  # five of five: no choice


def test_two_columns_of_zeros_and_ones_may_be_a_mask_or_ids():
    readings = list(call_specs((rand(3, H), torch.tensor([[0, 1], [1, 0], [0, 1]])), {}))
    assert [p.leaves[1].role for p in readings[:2]] == ["choices", "ids"]


def test_arguments_that_are_no_tensors_have_one_reading():
    mask = torch.nn.functional.one_hot(torch.tensor([1, 0, 2]), 4)
    for call_spec in call_specs((rand(3, H), mask), {"cache": None, "flag": True, "n": torch.tensor([2, 2])}):
        assert [leaf.role for leaf in call_spec.leaves[2:]] == ["static"] * 3
