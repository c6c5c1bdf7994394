"""Indices below zero, which ONNX counts from the end: an engine stops where the model does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.errors import UsageError
from tests.toy_moe import seeded

FORMS = {
    "bincount": lambda ids, rows: torch.bincount(ids, minlength=4),
    "bincount of 16 bits": lambda ids, rows: ids.short().bincount(minlength=4),
    "one_hot": lambda ids, rows: F.one_hot(ids, 4),
    "large": lambda ids, rows: F.one_hot(ids, 4),
    "one_hot of places": lambda ids, rows: F.one_hot(torch.eye(9)[ids].argmax(-1), 4),
    "one_hot of tops": lambda ids, rows: F.one_hot(torch.eye(9)[ids].topk(1)[1], 4),
    "one_hot of one": lambda ids, rows: F.one_hot(ids[0], 4),
    "repeats": lambda ids, rows: rows[:3].repeat_interleave(ids, 0),
    "bag": lambda ids, rows: F.embedding_bag(ids[None], rows),
    "likelihood": lambda ids, rows: F.nll_loss(rows[:3], ids),
    "cross entropy": lambda ids, rows: F.cross_entropy(rows[:3], torch.where(ids == 1, -100, ids)),
    "sort": lambda ids, rows: rows.index_select(0, ids.sort()[0]),
    "top values": lambda ids, rows: rows.index_select(0, ids.topk(3)[0]),
    "min": lambda ids, rows: rows.index_select(0, ids.min(0, keepdim=True)[0]),
    "least": lambda ids, rows: rows.index_select(0, ids.min().reshape(1)),
    "padded": lambda ids, rows: rows.index_select(0, torch.constant_pad_nd(ids.abs(), (0, 1), -1)[ids]),
    "filled": lambda ids, rows: rows.index_select(0, ids.new_zeros(4).scatter(0, (ids < 0).long(), -1)[1:2]),
    "not": lambda ids, rows: rows.index_select(0, ~(-1 - ids)),
}
GOOD, BAD = torch.tensor([1, 2, 0]), torch.tensor([-1, -2, 0])


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(seeded(4, 3))

    def forward(self, *ids):
        return [form(own, self.rows) * 1 for own, form in zip(ids, FORMS.values(), strict=True)]


def test_an_engine_stops_at_the_indices_where_the_model_does():
    model = Looked().eval()
    engine = moeopt.optimize(model, (GOOD,) * len(FORMS), backend="onnxruntime", verify="off")
    for got, want in zip(engine(*[GOOD] * len(FORMS)), model(*[GOOD] * len(FORMS)), strict=True):
        torch.testing.assert_close(got, want)
    for at, name in enumerate(FORMS):
        ids = [GOOD] * len(FORMS)
        ids[at] = BAD + 9 if name == "large" else BAD
        with pytest.raises((IndexError, RuntimeError)):
            model(*ids)
        with pytest.raises(UsageError, match="the graph does not take") as stopped:
            engine(*ids)
        assert "expert ids" not in str(stopped.value)
