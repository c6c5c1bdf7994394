"""In which other sizes an engine is compared, and what is said of the sizes that it is not compared in."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from moeopt.lower.other_sizes import other_sizes, sizes_to_try
from tests.backends.onnxrt.test_size_guards import signature

A, B = ["size", 0, 0], ["size", 1, 0]


def shapes(calls):
    return [tuple(tuple(t.shape) for t in args) for args, _ in calls]


def call(*sizes):
    return tuple(torch.arange(a * b).reshape(a, b) for a, b in sizes), {}


def test_every_free_size_is_made_larger_and_the_least():
    stated = signature(sizes={"s0": [1, None], "s1": [3, 8], "w": [1, None]})
    assert shapes(other_sizes(stated, call((2, 3), (4, 3)))) == [((5, 7), (8, 7)), ((1, 1), (3, 1))]


def test_a_size_that_was_the_product_of_two_stays_so():
    stated = signature()
    stated["inputs"][1]["shape"] = ["n", "k"]
    calls = other_sizes(stated, call((2, 5), (10, 3)))
    assert shapes(calls) == [((5, 11), (55, 7)), ((1, 1), (1, 1))]


def test_a_computed_size_is_what_its_condition_says():
    stated = signature([["==", B, ["+", A, 2]]])
    stated["inputs"][1]["shape"] = [None, "w"]
    assert shapes(other_sizes(stated, call((3, 2), (5, 2)))) == [((7, 5), (9, 5)), ((1, 1), (3, 1))]


def test_sizes_that_an_engine_does_not_hold_for_are_told_and_near_ones_tried():
    stated = signature([["and", [">=", A, 4], ["<=", A, 5]]], names=("s0", "s1"))
    calls, left_out = sizes_to_try(stated, call((4, 3), (2, 3)))
    assert shapes(calls) == [((5, 3), (2, 3))]
    assert left_out == ["(9, 7), (5, 7) and (1, 1), (1, 1): the engine holds only where x.shape[0] is 4 to 5"]


class PerToken(nn.Module):
    """The second input is an id for each token; the model's own loop runs with fewer too, and leaves tokens out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randint(0, 4, (50, 2), generator=torch.Generator().manual_seed(0)))
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(4))

    def forward(self, x, ids):
        flat, pick = x.reshape(-1, x.shape[-1]), self.table[ids]
        weights, y = self.router(flat).softmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, _ = torch.where(pick == number)
            if token.numel():
                y.index_add_(0, token, expert(flat[token]) * weights[token, number, None])
        return y.view(x.shape)


def test_an_id_for_each_token_is_compared_with_as_many_ids():
    torch.manual_seed(0)
    model, x, ids = PerToken().eval(), torch.randn(2, 9, 8), torch.randint(0, 50, (18,))
    engine = moeopt.optimize(model, (x, ids), backend="onnxruntime")
    assert [b.status for b in engine.report.blocks] == ["rewritten"]
    assert "equal in 2 other sizes too" in engine.certificate.end_to_end.notes
    for count in (1, 7):  # one id would be broadcast to all tokens
        with pytest.raises(UsageError, match=r"where ids.shape\[0\] == \(x.shape\[1\] \* x.shape\[0\]\)"):
            engine(x, ids[:count])
