"""All weights of a bank looked at together: whatever moves, changes or is hooked is noticed as when each is read."""

import pytest
import torch
from torch import nn

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.triton.addresses import weights_of
from moeopt.rewrite.live_weights import LiveExpertWeights, Place
from moeopt.rewrite.refused_call import Stale
from tests.rewrite.test_live_weights import H, listed

SPEC = ExpertsSpec(rows="plain", activation="relu")
CPU = torch.device("cpu")


def bank_of(root, refs, **more):
    return LiveExpertWeights(root, refs, ("oi", "oi"), **more)


def addresses(root):
    """What the table must hold: W_in, W_out, and their biases, of the Parameters as they are."""
    firsts, seconds = [pair[0] for pair in root.experts], [pair[2] for pair in root.experts]
    w_in, b_in = ([getattr(m, n).data_ptr() for m in firsts] for n in ("weight", "bias"))
    w_out, b_out = ([getattr(m, n).data_ptr() for m in seconds] for n in ("weight", "bias"))
    return [w_in, w_out, b_in, b_out]


def table(bank):
    rows = weights_of(bank, SPEC, H, CPU).table.tolist()
    return [rows[0], rows[2], rows[3], rows[5]]


def test_what_lies_as_it_lay_is_not_read_again(monkeypatch):
    root, refs = listed()
    bank = bank_of(root, refs)
    assert table(bank) == addresses(root)
    monkeypatch.setattr(Place, "read", lambda place: pytest.fail("read one by one"))
    assert table(bank) == addresses(root)


def swapped_data(root):
    root.experts[1][2].weight.data = root.experts[1][2].weight.data.clone()


def new_parameter(root):
    root.experts[1][0].bias = nn.Parameter(torch.ones_like(root.experts[1][0].bias))


def deleted_and_new(root):
    held = root.experts[2][0]
    new = nn.Parameter(torch.ones_like(held.weight))  # while the old one lives, so at another address
    del held.weight
    held.weight = new


@pytest.mark.parametrize("change", [swapped_data, new_parameter, deleted_and_new])
def test_a_weight_that_moved_is_found_where_it_is(change):
    root, refs = listed()
    bank, before = bank_of(root, refs), addresses(root)
    assert table(bank) == before
    change(root)
    assert addresses(root) != before and table(bank) == addresses(root)


def test_other_strides_at_the_same_address_are_seen():
    root, refs = listed()
    for pair in root.experts:
        pair[0].weight.data = torch.ones(5, 8)[:, :4]
    bank = bank_of(root, refs)
    assert weights_of(bank, SPEC, H, CPU).in_steps == (8, 1)
    for pair in root.experts:
        pair[0].weight.data = pair[0].weight.data.as_strided((5, 4), (4, 1))
    assert weights_of(bank, SPEC, H, CPU).in_steps == (4, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.experts[1][0].register_forward_hook(lambda *a: None), "a forward hook was registered"),
        (lambda r: r.experts[1][2].register_forward_pre_hook(lambda *a: None), "a forward hook was registered"),
        (lambda r: r.experts.__setitem__(1, nn.Sequential(*r.experts[1])), "the module that holds .* was replaced"),
        (lambda r: r.experts[1].__setitem__(0, nn.Linear(4, 5)), "the module that holds .* was replaced"),
        (lambda r: r.experts[1][0].half(), "changed from torch.float32"),
        (lambda r: delattr(r.experts[0][2], "weight"), "is no longer a plain Parameter"),
        (lambda r: r.experts[0][2].to("meta"), "is on the meta device"),
    ],
)
def test_what_is_stale_says_so_as_when_read_one_by_one(change, reason):
    root, refs = listed()
    bank = bank_of(root, refs)
    table(bank)
    change(root)
    with pytest.raises(Stale, match=reason):
        table(bank)


def test_every_expert_is_checked_at_each_call():
    root, refs = listed()
    asked = []
    bank = bank_of(root, refs, check=asked.append)
    table(bank)
    asked.clear()
    table(bank)
    assert asked == [0, 1, 2]


def test_the_table_keeps_no_weight_alive():
    root, refs = listed()
    bank = bank_of(root, refs)
    assert weights_of(bank, SPEC, H, CPU).alive == ()


class Elsewhere(Place):
    pass


def test_what_is_made_at_each_read_is_read_at_each_call():
    root, refs = listed()
    assert bank_of(root, refs, place=Elsewhere).lies() is None
    refs[0] = type(refs[0])(refs[0].w_in, refs[0].b_in, refs[0].w_out, refs[0].b_out, neurons=(1, 0, 2, 3, 4))
    picked = bank_of(root, refs)
    assert picked.lies() is None and len(weights_of(picked, SPEC, H, CPU).alive) == 4 * 3
