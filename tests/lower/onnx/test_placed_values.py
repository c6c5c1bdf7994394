"""Writes at places, and searches in sorted numbers, that torch's exporter has no form for: the same numbers as
PyTorch's, at numbers that are not sorted, NaN and infinity, and an error where PyTorch has one."""

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.errors import MoeoptError
from moeopt.lower.traced_forms import traced_form
from tests.toy_moe import seeded

EDGES = torch.linspace(-1, 1, 7)
SEARCHED = {
    "sorted": lambda ids, r: torch.searchsorted(EDGES, r),
    "behind equal ones": lambda ids, r: torch.searchsorted(EDGES, r.round(), right=True),
    "in rows": lambda ids, r: torch.searchsorted(r, r.flip(1).contiguous(), side="right", out_int32=True),
    "in another order": lambda ids, r: torch.searchsorted(r[0], r[1], sorter=r[0].argsort()),
    "integers": lambda ids, r: torch.searchsorted(torch.tensor([0, 2, 3]), ids),
    "one number": lambda ids, r: torch.searchsorted(EDGES, 0.3) + ids,
    "buckets": lambda ids, r: torch.bucketize(r.half(), EDGES.half(), right=True, out_int32=True),
    "buckets without bounds": lambda ids, r: torch.bucketize(r, EDGES[:0]),
    "as many as there are rows": lambda ids, r: torch.searchsorted(r[:, 0].contiguous(), EDGES),
}
PLACED = {
    "added": lambda ids, r: torch.zeros(3, 4).scatter(1, ids[:, None], r[:3], reduce="add"),
    "multiplied by one number": lambda ids, r: torch.ones(3, 4).scatter_(1, ids[:, None], 2.0, reduce="multiply"),
    "largest": lambda ids, r: torch.zeros(4, 4).index_reduce(0, ids, r[:3], "amax"),
    "product of columns": lambda ids, r: r[:4].index_reduce(1, ids, r[:4, :3], "prod", include_self=False),
    "mean": lambda ids, r: torch.ones(4, 4).index_reduce(0, ids, r[:3], "mean"),
    "weighed counts": lambda ids, r: torch.bincount(ids, r[:3, 0], minlength=4),
    "counts of integers": lambda ids, r: torch.bincount(ids, ids, minlength=4),
    "put": lambda ids, r: torch.zeros(2, 2).put(ids, r[0, :3], accumulate=True),
}


class Each(nn.Module):
    def __init__(self, forms):
        super().__init__()
        self.forms = forms

    def forward(self, rows, *ids):
        return [form(own, rows) * 1 for own, form in zip(ids, self.forms.values(), strict=True)]


def engine(forms):
    model, ids = Each(forms).eval(), torch.tensor([1, 0, 3])
    return model, moeopt.optimize(model, (seeded(8, 4), *[ids] * len(forms)), backend="onnxruntime", verify="off")


def test_searches_by_halves_give_pytorchs_places():
    model, built = engine(SEARCHED)
    odd = seeded(8, 4)
    odd[0, 1], odd[2], odd[3, 0] = torch.nan, torch.nan, torch.inf
    for rows in (seeded(8, 4), odd, odd[:4]):
        call = (rows, *[torch.tensor([2, 2, 0])] * len(SEARCHED))
        for name, got, want in zip(SEARCHED, built(*call), model(*call), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want), name


def test_values_are_placed_as_in_pytorch_and_indices_out_of_range_are_refused():
    model, built = engine(PLACED)
    good = [torch.tensor([2, 2, 0])] * len(PLACED)
    for got, want in zip(built(seeded(8, 4), *good), model(seeded(8, 4), *good), strict=True):
        torch.testing.assert_close(got, want)
        assert got.dtype == want.dtype
    for at, name in enumerate(PLACED):
        for number in (4, -1, 2**40) if "counts" not in name and name != "put" else (-5,):
            bad = [*good[:at], torch.tensor([0, number, 1]), *good[at + 1 :]]
            with pytest.raises((IndexError, RuntimeError)):
                model(seeded(8, 4), *bad)
            with pytest.raises(MoeoptError, match="the graph does not take"):
                built(seeded(8, 4), *bad)


def test_counts_with_weights_have_a_form_where_data_decide_a_size():
    ids, weights = torch.tensor([1, 3, 1]), torch.tensor([0.5, 2.0, 0.25])
    for given in (weights, weights.double(), ids):
        found = traced_form(torch.bincount, (ids, given), {"minlength": 5})
        want = torch.bincount(ids, given, minlength=5)
        assert found.dtype == want.dtype and torch.equal(found, want)
    assert traced_form(torch.bincount, (ids, weights), {}) is None
