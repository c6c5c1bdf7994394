"""What the native kernel keeps of each expert: what moves, changes or is hooked is noticed at the next call."""

import pytest
import torch
from torch import nn

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts_reference
from moeopt.ops.native.call import call
from moeopt.ops.native.library import library
from moeopt.rewrite.live_weights import LiveExpertWeights, Place
from moeopt.rewrite.refused_call import Stale
from tests.rewrite.test_bank_layout import deleted_and_new, new_parameter, swapped_data
from tests.rewrite.test_live_weights import H, listed

SPEC = ExpertsSpec(rows="plain", activation="relu")
IDS = torch.tensor([[1, 2], [0, 1]])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def bank():
    torch.manual_seed(0)
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    bank.root = root
    assert equal(bank)
    return bank


def equal(bank, ids=IDS):
    """Whether the kernel computes on ``bank`` what the reference does."""
    native = library()
    if native is None:
        pytest.skip("no native kernel here")
    x, weights = torch.randn(2, H), torch.rand(2, 2)
    got = call(native.run, x, ids, weights, bank, SPEC, native.bit)
    return torch.allclose(got, experts_reference(x, ids, weights, bank, SPEC), atol=1e-5)


def transposed(root):
    """Other strides, and other numbers, at the same address."""
    weight = root.experts[1][2].weight
    weight.data = weight.data.as_strided(weight.shape, (1, weight.shape[0]))


def written(root):
    root.experts[2][0].weight.mul_(3)


def negated(root):
    """The same memory, read with the other sign."""
    weight = root.experts[1][0].weight
    weight.data = torch._neg_view(weight.data)


def test_what_lies_as_it_lay_is_not_read_again(bank, monkeypatch):
    x, weights = torch.randn(2, H), torch.rand(2, 2)
    want = experts_reference(x, IDS, weights, bank, SPEC)
    monkeypatch.setattr(Place, "read", lambda place: pytest.fail("read one by one"))
    torch.testing.assert_close(call(library().run, x, IDS, weights, bank, SPEC, library().bit), want)


@pytest.mark.parametrize("change", [swapped_data, new_parameter, deleted_and_new, transposed, written])
def test_a_weight_that_moved_is_found_where_it_is(bank, change):
    change(bank.root)
    assert equal(bank)


def test_another_spec_has_other_entries(bank):
    x, weights = torch.randn(2, H), torch.rand(2, 2)
    for spec in (ExpertsSpec(rows="plain", activation="relu", accum_dtype="float32"), SPEC):
        got = call(library().run, x, IDS, weights, bank, spec, library().bit)
        torch.testing.assert_close(got, experts_reference(x, IDS, weights, bank, spec))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.experts[1][0].register_forward_hook(lambda *a: None), "a forward hook was registered"),
        (lambda r: r.experts.__setitem__(1, nn.Sequential(*r.experts[1])), "the module that holds .* was replaced"),
        (lambda r: r.experts[1][0].half(), "changed from torch.float32"),
        (lambda r: delattr(r.experts[1][2], "weight"), "is no longer a plain Parameter"),
    ],
)
def test_what_is_stale_says_so(bank, change, reason):
    change(bank.root)
    with pytest.raises(Stale, match=reason):
        equal(bank)


def test_a_sign_that_is_only_a_mark_is_seen(bank):
    negated(bank.root)
    with pytest.raises(Exception, match="has no plain memory"):
        equal(bank)


def test_only_experts_that_are_hit_are_checked_and_read():
    root, refs = listed()
    asked = []
    bank = LiveExpertWeights(root, refs, ("oi", "oi"), check=asked.append)
    for _ in range(2):
        asked.clear()
        x, weights = torch.randn(1, H), torch.rand(1, 2)
        call(library().run, x, torch.tensor([[2, 0]]), weights, bank, SPEC, library().bit)
        assert set(asked) == {0, 2}
    assert asked == [0, 2]


def test_no_weight_is_kept_alive(bank):
    assert bank.entries.keys() == {0, 1, 2}
    for known in bank.entries.values():
        assert not any(isinstance(part, torch.Tensor) for part in (*known, *known[1], *known[2]))
