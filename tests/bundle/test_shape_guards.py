"""Conditions from a file: numbers that stay small, operands that fit, sizes that are there."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.bundle.shape_guards import check_conditions, encode_conditions, holds, read_conditions
from moeopt.errors import BundleError, NotSaveableError

SIZE = ["size", 0, 0]


def shapes(leaf):
    return [(5, 7), (3,)][leaf]


@pytest.mark.parametrize(
    "condition",
    [
        ["==", ["**", 9, ["**", 9, 9]], SIZE],
        ["==", ["**", SIZE, 9], 1],
        ["==", ["**", SIZE, -1], 1],
        ["==", ["**", SIZE, 0.5], 1],
        ["==", ["**", SIZE, True], 1],
        ["==", ["**", ["+", SIZE, 1], 2], 1],
        ["==", 1 << 65, SIZE],
        ["==", SIZE],
        ["==", SIZE, 1, 2],
        ["max", SIZE],
        ["size", 0],
        ["size", 0, 2],
        ["size", 2, 0],
        ["size", True, 0],
        ["size", 0, -1],
        ["<<", 1, 2],
        [["=="], 1, 1],
        [],
        "x",
        None,
    ],
)
def test_what_moeopt_does_not_write_is_refused(condition):
    with pytest.raises(BundleError, match="are not conditions that moeopt writes"):
        read_conditions([condition], lambda leaf: len(shapes(leaf)) if leaf < 2 else 0)


def test_depth_and_number_are_bounded():
    deep = SIZE
    for _ in range(70):
        deep = ["+", deep, 1]
    for conditions in ([["==", deep, 1]], [["and", *[["==", SIZE, SIZE]] * 30000]], 7):
        with pytest.raises(BundleError, match="are not conditions that moeopt writes"):
            read_conditions(conditions)


def test_a_small_power_of_an_older_bundle_is_a_product():
    read = read_conditions([["==", ["**", SIZE, 2], 25]])
    assert read == [["==", ["*", SIZE, SIZE], 25]]
    assert holds(read, shapes)


def test_a_small_power_is_saved_as_a_product():
    assert encode_conditions(["L['x'].size()[0] ** 3 > 8"], {"x": 0}) == [[">", ["*", ["*", SIZE, SIZE], SIZE], 8]]
    with pytest.raises(NotSaveableError, match="cannot be checked at a call"):
        encode_conditions(["L['x'].size()[0] ** 30 > 8"], {"x": 0})


def test_what_moeopt_writes_is_read_back():
    written = encode_conditions(["max(2, L['x'].size()[0]) == 5", "L['x'].size()[1] % 7 == 0"], {"x": 0})
    assert read_conditions(written, lambda leaf: 2) == written
    check_conditions(written, shapes, str)


class Halves(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.linear, self.parts = nn.Linear(3, 3), parts

    def forward(self, x):
        return self.linear(x) + x.tensor_split(self.parts)[1].sum(0)


@pytest.mark.parametrize(("parts", "rows"), [(2, 7), (4, 6)])
def test_how_parts_come_out_is_a_condition(parts, rows):
    """``tensor_split`` asks for the remainder of a size: no question of whether something is 0 or 1."""
    model = Halves(parts).eval()
    engine = moeopt.optimize(model, torch.randn(rows, 3), backend="onnxruntime", verify="off")
    for size in range(1, 13):
        x = torch.randn(size, 3)
        try:
            got = engine(x)
        except moeopt.MoeoptError:
            assert size != rows
            continue
        torch.testing.assert_close(got, model(x), msg=f"{size} rows")
