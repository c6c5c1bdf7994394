"""Tiles of other sizes than the interpreter's usual ones: wide, deep, and of experts with many neurons."""

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, experts_reference
from moeopt.ops.triton import launch
from moeopt.ops.triton.launch import experts_triton, tile_of_token
from moeopt.ops.triton.tiles import Tiles, few_pairs
from tests.ops.cases import make
from tests.ops.triton.test_interpreted import FEW, MANY, SMALL

pytestmark = pytest.mark.usefixtures("interpreted")


def test_the_second_product_has_wider_tiles_where_enough_programs_are_left(monkeypatch):
    from moeopt.ops.triton import kernels

    widths, honest = [], kernels.tile_out

    class Noted:
        def __getitem__(self, grid):
            return lambda *args, **named: widths.append((grid, named["BN"])) or honest[grid](*args, **named)

    monkeypatch.setattr(kernels, "tile_out", Noted())
    case = make(ExpertsSpec(), T=9, E=2, K=1, dtype=torch.float32)
    for enough in (launch.ENOUGH, 1):
        monkeypatch.setattr(launch, "ENOUGH", enough)
        got = experts_triton(*case.args, few=MANY, tiles=SMALL._replace(wider=2))
        torch.testing.assert_close(got, experts_reference(*case.args), rtol=1e-5, atol=1e-5)  # sums of few terms
    assert [width for _, width in widths] == [16, 32]


@pytest.mark.parametrize("few", (pytest.param(FEW, marks=pytest.mark.nightly), MANY))  # 900 programs, interpreted
def test_experts_of_14336_neurons(few):
    g = torch.Generator().manual_seed(0)
    I, H = 14336, 16
    w_in, w_out = (torch.randn(shape, generator=g) for shape in ((I, H), (H, I)))
    bank = ListExpertWeights([[w_in] * 8, [w_in * 2] * 8], [w_out / I] * 8)  # eight experts lie on one another
    args = torch.randn(1, H, generator=g), torch.tensor([[6]]), torch.ones(1, 1), bank, ExpertsSpec(rows="separate")
    want = experts_reference(*args)
    got = experts_triton(*args, few=few, tiles=Tiles(16, 512, 256, 4, 1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32 sums of 14336 terms of size up to 100


def test_the_tiles_of_a_token_s_experts_hold_no_more_numbers_than_registers_do():
    for K in range(1, 65):
        columns, depth = tile_of_token(K)
        assert columns * depth * (1 << (K - 1).bit_length()) <= 4096


def test_few_pairs_are_at_most_two_an_expert():
    assert [few_pairs(E) for E in (1, 2, 8, 16, 128)] == [2, 4, 16, 32, 32]
