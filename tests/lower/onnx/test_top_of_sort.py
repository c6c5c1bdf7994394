"""The first of sorted values become a choice of so many, with the same values and places; nothing else does."""

import pytest
import torch

pytest.importorskip("onnxruntime")

from tests.lower.onnx.emitted import graph_of, session_of, together

FIRST = {
    "largest": lambda x: [y.narrow(-1, 0, 2) for y in x.sort(dim=-1, descending=True, stable=True)],
    "smallest": lambda x: [y[:3] for y in x.sort(dim=0, stable=True)],
    "places": lambda x: [x.sort(-1, descending=True)[1][:, :4]],
    "numbers": lambda x: [x.sort(1)[0][:, :1]],
}
ANY_NUMBER = {
    "largest": lambda x: [y[:, :2] for y in x.sort(dim=-1, descending=True, stable=True)],
    "places": lambda x: [x.sort(-1)[1][:, :][:, :4]],
}
"""Of rows: a slice that takes all of them stands before the one that takes the first of each."""
REST = {
    "last": lambda x: [x.sort(dim=-1, stable=True)[0][:, 1:]],
    "two numbers": lambda x: [(y := x.sort(dim=-1, stable=True))[0][:, :2], y[1][:, :3]],
    "all": lambda x: [*x.sort(dim=-1, stable=True)],
    "other axis": lambda x: [x.sort(dim=-1, stable=True)[0][:2]],
    "each second": lambda x: [x.sort(dim=-1, stable=True)[0][:, 0:4:2]],
    "more than there are": lambda x: [x.sort(dim=-1, stable=True)[0][:, :9]],
    "read whole too": lambda x: [(y := x.sort(dim=-1, stable=True)[0])[:, :5], y + 1],
}
X = torch.tensor(
    [[1, 2, 2, torch.nan, 0, 2], [torch.inf, -torch.inf, 1, 1, torch.inf, -torch.inf], [0.0, -0.0, 3, 3, 3, 0]]
)


def listed(functions):
    shape = (-1, 6) if functions is ANY_NUMBER else (3, 6)
    return together([lambda x, f=f: tuple(f(x.reshape(shape))) for f in functions.values()])


def flat(made):
    return [y for one in made for y in one]


@pytest.mark.parametrize(("functions", "slices"), [(FIRST, 0), (ANY_NUMBER, 0), (REST, 6)])
def test_the_values_and_places_are_those_of_the_sort(functions, slices):
    function = listed(functions)
    graph = graph_of(function, X).graph
    assert [node.op_type for node in graph].count("Slice") == slices
    got = session_of(function, X).run({"x": X})
    for mine, wanted in zip(got, flat(function(X)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)
