"""Numbers that are nowhere in the code and nowhere in the module: the code computes them from those that are."""

import types

import pytest
import torch

import moeopt
from moeopt.control_flow.computed_numbers import computed_numbers
from tests.toy_moe import Block, E, H, build

FACTOR = 7


class Computing(Block):
    def __init__(self):
        super().__init__()
        self.side, self.config = 40, types.SimpleNamespace(length=300)

    @property
    def costly(self):
        raise AssertionError("no code of the model's runs")

    def limit(self):
        """Of tokens."""
        return len(self.experts) * 125


class Square(Computing):
    @torch.no_grad()
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if x.numel() // H > self.side**2 else y


class Local(Computing):
    def forward(self, x):
        most = self.config.length + 1
        return super().forward(x) * (1 if len(x) <= most else 2)


class Method(Computing):
    def forward(self, x):
        return super().forward(x) * (1 if len(x) <= self.limit() else 2)


class Sliced(Computing):
    def forward(self, x):
        return torch.cat([super().forward(x[: FACTOR * 99]), x[min(len(x), int(99.5 * FACTOR)) :]])


class Unknown(Computing):
    def forward(self, x):
        n = 3
        n = len(x) + n
        return super().forward(x) * (1 if n > self.costly + 1 or n / 0 > self.side << -1 or n < x.shape[1] * 2 else 2)


@pytest.mark.parametrize(
    ("make", "numbers"),
    [(Square, {1600}), (Local, {301}), (Method, {E * 125}), (Sliced, {FACTOR * 99, 696}), (Unknown, set())],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_the_numbers(make, numbers):
    assert computed_numbers(build(make)) == numbers


def test_a_branch_at_a_computed_number_is_found():
    (block,) = moeopt.explain(build(Square), torch.randn(6, H), verify="fast").blocks
    assert block.status == "declined" and "case 'more tokens than 1600, a number in its code'" in block.reason
