"""Rows at the experts are matched to tokens by value: bit for bit, or up to a factor."""

import pytest
import torch

from moeopt.errors import Declined
from moeopt.recognise.gemm_sites import find_sites
from moeopt.recognise.token_rows import match_tokens, token_readings
from tests.capture.tiny import rand, recorded

T, H, M = 7, 5, 3
IDS = torch.tensor([4, 0, 4, 6])


def matched(dispatch, *shape, **parts):
    tape = recorded(lambda m, x: dispatch(x) @ m.w, rand(*(shape or (T, H))), w=rand(H, M, seed=1), **parts)
    sites = find_sites(tape)
    return tape, sites, match_tokens(tape, sites)


@pytest.mark.parametrize(
    "dispatch",
    [
        lambda x: x[IDS],
        lambda x: x.index_select(0, IDS),
        lambda x: torch.eye(T)[IDS] @ x,
        lambda x: torch.stack([x[i] for i in IDS.tolist()]),
        lambda x: torch.einsum("nt,th->nh", torch.eye(T)[IDS], x),
        lambda x: torch.gather(x, 0, IDS[:, None].expand(-1, H)),
        lambda x: x.repeat_interleave(2, 0)[2 * IDS + 1],
    ],
)
def test_dispatch_is_read_off_the_values(dispatch):
    tape, (site,), found = matched(dispatch)
    assert found.node is tape.args[0] and (found.axis, found.count) == (1, T) and not found.weighted
    assert found.token[site].tolist() == IDS.tolist() and found.scale[site].tolist() == [1.0] * 4


def test_padding_is_minus_one():
    _, (site,), found = matched(lambda x: torch.cat([x[IDS], torch.zeros(2, H)]))
    assert found.token[site].tolist() == [*IDS.tolist(), -1, -1]


def test_weighted_rows_are_tokens_times_a_factor():
    ids, weights = IDS.repeat(2), torch.linspace(-2, 0.7, 8)
    _, (site,), found = matched(lambda x: torch.cat([x[ids] * weights[:, None], torch.zeros(1, H)]))
    assert found.weighted and found.token[site].tolist() == [*ids.tolist(), -1]
    # the factor was rounded once with each element
    torch.testing.assert_close(found.scale[site][:8], weights.double(), rtol=1e-6, atol=0)


def test_features_may_lie_on_another_axis():
    tape, (site,), found = matched(lambda x: x.permute(0, 2, 1).reshape(-1, H), 2, H, 3)
    assert found.axis == 1 and found.count == 6 and found.token[site].tolist() == list(range(6))


def test_a_narrower_dtype_at_the_experts_is_still_a_copy():
    tape = recorded(lambda m, x: x[IDS].bfloat16() @ m.w.bfloat16(), rand(T, H), w=rand(H, M))
    sites = find_sites(tape)
    found = match_tokens(tape, sites)
    assert found.node is tape.args[0] and found.token[sites[0]].tolist() == IDS.tolist()


def test_equal_tokens_are_told_apart_by_their_turn():
    def fn(m, x):
        return torch.cat([x, x[:1]])[torch.tensor([0, T, 1])] @ m.w

    tape = recorded(fn, rand(T, H), w=rand(H, M))
    last = list(token_readings(tape, find_sites(tape)))[0]
    assert list(last.token.values())[0].tolist()[2] == 1


def test_each_order_of_rows_is_a_reading_the_earliest_first():
    tape = recorded(lambda m, x: x.flip(0)[:3] @ m.w, rand(T, H), w=rand(H, M))
    readings = list(token_readings(tape, find_sites(tape)))
    assert readings[0].node is tape.args[0] and len(readings) >= 2
    assert [list(r.token.values())[0].tolist() for r in readings[:2]] == [[6, 5, 4], [0, 1, 2]]


def test_rows_that_are_in_no_one_tensor_are_declined():
    def fn(m, x):
        return x @ m.w + x.flip(-1) @ m.w  # two tensors, neither holds the rows of the other

    tape = recorded(fn, rand(T, H), w=rand(H, M))
    with pytest.raises(Declined, match="the experts' input rows are not rows of any one tensor") as caught:
        match_tokens(tape, find_sites(tape))
    assert "test_token_rows.py:" in caught.value.where


def test_products_of_different_widths_are_declined():
    def fn(m, x):
        return x @ m.w, x[:, :3] @ m.w[:3]

    tape = recorded(fn, rand(T, H), w=rand(H, M))
    with pytest.raises(Declined, match="the experts' first matmuls take rows of different widths"):
        match_tokens(tape, find_sites(tape))
