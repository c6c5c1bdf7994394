"""An engine refuses the sizes that the model's own code would have treated otherwise, and no others."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import moeopt
from moeopt.bundle.shape_guards import only_asked
from moeopt.lower.asked_lengths import asks_lengths
from moeopt.lower.export import export_program
from moeopt.lower.signature import functional, size_conditions
from moeopt.lower.specialization_guards import counted_sizes
from moeopt.patches import free_lengths


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def conditions(function, *shape):
    return size_conditions(functional(export_program(Apply(function), (torch.randn(shape),), {})))


def threes(x):
    return x.sum(1, keepdim=True).expand(-1, 3)


ROWS, COLUMNS = ["size", 0, 0], ["size", 0, 1]


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (lambda x: x * 2 if x.shape[0] > 1 else x, [[">", ROWS, 1]]),
        (lambda x: x if x.shape[0] < 2 else x * 2, [[">=", ROWS, 2]]),
        (lambda x: x * 2 if x.shape[0] != 1 else x, [["!=", ROWS, 1]]),
        (lambda x: x * 2 if x.shape[0] == 5 else x, [["==", ROWS, 5]]),
        (lambda x: x * 2 if x.numel() > 8 else x, [[">", ["*", COLUMNS, ROWS], 8]]),
        (lambda x: x.squeeze(0) * 2, [["!=", ROWS, 1]]),
        (lambda x: torch.cross(threes(x), threes(x * x)), [["!=", ROWS, 3]]),
        (lambda x: torch.cross(threes(x), threes(x * x), dim=1), []),
        (lambda x: (x.t().contiguous().t() + 1).reshape(-1), []),
        (lambda x: x.t().reshape(-1) * 2, []),
    ],
    ids=[
        "more than one",
        "not less than two",
        "not one",
        "exactly",
        "a product",
        "squeeze",
        "cross",
        "cross along",
        "strides",
        "reshape",
    ],
)
def test_only_the_models_own_questions_are_conditions(function, want):
    assert conditions(function, 5, 4) == want


def test_a_condition_is_known_in_whichever_way_it_is_written():
    kept = ["<", 1, ROWS]
    assert only_asked([kept], [[">", ROWS, 1]]) == [kept]
    assert only_asked([["<", 4, ["*", 4, ROWS]]], []) == []
    assert only_asked([["<", 3, ["*", 4, ROWS]], [">=", ["*", 4, ROWS], 1]], []) == []  # one row or more
    for kept in (["<", 3, ["*", 4, ["/", ROWS, 2]]], [">", ["*", 4, ROWS], 11], ["<", ["*", 4, ROWS], 3]):
        assert only_asked([kept], []) == [kept]
    assert only_asked([["<", 3, ["*", 4, ROWS]]], [[">", ["*", 4, ROWS], 3]]) == [["<", 3, ["*", 4, ROWS]]]  # asked
    assert only_asked([["<", 8, ["*", 4, ROWS]]], []) == [["<", 8, ["*", 4, ROWS]]]  # more than two rows


@pytest.mark.parametrize(
    "function", [lambda x: x.squeeze(-1).cumsum(0), lambda x: x.squeeze() * 2, lambda x: x.squeeze((1,)) * 2]
)
def test_a_size_of_one_that_the_code_squeezes_away_is_gone_in_the_trace_too(function):
    program = export_program(Apply(function), (torch.randn(3, 1),), {})
    (result,) = next(n for n in program.graph.nodes if n.op == "output").args[0]
    assert result.meta["val"].dim() == 1
    assert size_conditions(functional(program)) == []
    x = torch.randn(5, 1)
    torch.testing.assert_close(program.module()(x), function(x))


def summed(x):
    total = x[:, 0]
    for place in range(1, x.shape[1]):
        total = total * 0.5 + x[:, place]
    return total


@pytest.mark.parametrize("layer", [torch.nn.GRU, torch.nn.LSTM, torch.nn.RNN])
def test_a_recurrent_layer_of_torch_counts_too(layer):
    """Its steps are counted in C++, where no line of Python asks; the features are no news."""
    function = layer(4, 4, batch_first=True)
    (note,) = counted_sizes(export_program(Apply(lambda x: function(x)[0]), (torch.randn(2, 3, 4),), {}))
    assert note.startswith("the engine holds for calls where x.shape[1] == 3, as in") and "a recurrent layer" in note
    assert "test_specialization_guards.py" in note


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (summed, ["x.shape[1] == 4"]),
        (lambda x: sum(row.relu() for row in x), ["x.shape[0] == 3"]),
        (lambda x: torch.stack([x[row].relu() for row in range(len(x))]), ["x.shape[0] == 3"]),
        (lambda x: x.reshape(x.shape[1], x.shape[0]) * x.shape[0], []),
        (lambda x: x.new_zeros(len(x), 2) + x.view(len(x), -1)[:, :2] * len([1, 2]), []),
        (lambda x: x @ torch.ones(4, 2), []),  # that its rows are as wide as a weight is no news
    ],
    ids=["places", "rows iterated over", "rows", "computed with", "a length", "a weight's"],
)
def test_a_size_that_python_counts_to_is_told(function, want):
    program = export_program(Apply(function), (torch.randn(3, 4),), {})
    notes = counted_sizes(program)
    assert len(notes) == len(want)
    for note, size in zip(notes, want, strict=True):
        assert (
            f"the engine holds for calls where {size}, as in the example call: the model's Python makes a plain" in note
        )
        assert "test_specialization_guards.py" in note and note.endswith("or use backend='torch'")


def test_lengths_are_asked_of_a_trace_alone_and_left_as_they_were():
    """A name that the code has of its own stays; another thread's calls get plain numbers."""
    names, own = {"x": 0}, {"len": sum}
    with free_lengths([names, own, names]):
        assert names["len"](torch.zeros(3, 2)) == 3 and names["len"]("ab") == 2 and own == {"len": sum}
        with ThreadPoolExecutor(1) as pool:
            assert type(pool.submit(names["len"], torch.zeros(3)).result()) is int
    assert names == {"x": 0} and own == {"len": sum}
    model = nn.Sequential(Apply(lambda x: x), Apply(summed), Apply(lambda x: [len(r) for r in x]))
    assert asks_lengths(model) == [globals()]
    assert asks_lengths(model[:2]) == []


def test_the_report_of_an_engine_tells_it():
    engine = moeopt.optimize(Apply(summed), torch.randn(3, 4), backend="onnxruntime", verify="fast")
    assert any("x.shape[1] == 4" in note and "a plain number of this size" in note for note in engine.report.notes)
    assert any("x.shape[1] == 4" in note for note in engine.certificate.notes)
