"""Attention that leaves the cache where it is: the function that sdpa computes, and nothing taken over that is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxscript")
pytest.importorskip("transformers.exporters")

from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moeopt.causal_lm import attention as causal_attention
from moeopt.causal_lm.attention import cache_left_in_place, grouped_attention


class Module(torch.nn.Module):
    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def tensors(B=2, G=2, R=3, S=4, T=9, D=8, V=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(B, G * R, S, D, generator=g)
    key, value = torch.randn(B, G, T, D, generator=g), torch.randn(B, G, T, V, generator=g)
    mask = torch.rand(B, 1, S, T, generator=g) < 0.7
    return query, key, value, mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3), G=st.integers(1, 3), R=st.integers(1, 4), S=st.integers(1, 5), T=st.integers(1, 12),
    seed=st.integers(0, 99), scaling=st.sampled_from([None, 1.0, 0.3]), per_head=st.booleans(),
)  # fmt: skip
def test_it_is_the_function_that_sdpa_computes(B, G, R, S, T, seed, scaling, per_head):
    query, key, value, mask = tensors(B, G, R, S, T, seed=seed)
    mask[0, 0, 0] = False  # a row that may look at nothing
    if per_head:
        mask = mask.expand(B, G * R, S, T)
    want, _ = sdpa_attention_forward(Module(R), query, key, value, mask, scaling=scaling)
    got, none = grouped_attention(query, key, value, mask, scaling)
    assert none is None and got.shape == want.shape == (B, S, G * R, 5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not got[0, 0, 0].any()
    narrow, _ = grouped_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, scaling)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), want, rtol=0.1, atol=0.1)


def calls(monkeypatch):
    """Which of the two functions a call inside the context takes."""
    taken = []
    monkeypatch.setattr(causal_attention, "grouped_attention", lambda *args: taken.append("grouped") or (None, None))
    with cache_left_in_place():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    def call(query, key, value, mask, **options):
        taken.clear()
        with cache_left_in_place():
            ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
            result, _ = ours(Module(query.shape[1] // key.shape[1]), query, key, value, mask, **options)
        return "grouped" if taken else result

    return call


def test_whatever_else_sdpa_does_stays_its_own(monkeypatch):
    call = calls(monkeypatch)
    query, key, value, mask = tensors()
    assert call(query, key, value, mask, dropout=0.0, scaling=0.5, sliding_window=3) == "grouped"
    bias = torch.randn(2, 6, 4, 9)
    others = {
        "no mask": (query, key, value, None, {}),
        "a float mask": (query, key, value, torch.zeros(2, 1, 4, 9).masked_fill(~mask, -1e30), {}),
        "a bias": (query, key, value, mask, {"position_bias": bias}),
    }
    for name, (*args, options) in others.items():
        got = call(*args, **options)
        want, _ = sdpa_attention_forward(Module(3), *args, **options)
        assert isinstance(got, torch.Tensor) and torch.equal(got, want), name
    with pytest.raises(ValueError, match="softcap"):
        call(query, key, value, mask, softcap=30.0)


def test_a_users_own_attention_is_left_alone():
    def mine(*args, **kwargs):
        raise AssertionError("never called here")

    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        with cache_left_in_place():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
