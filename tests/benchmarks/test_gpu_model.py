"""What is promised of a GPU holds in the model of bytes, FLOPs and launches; no GPU has run anything of it."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here")
pytest.importorskip("transformers")

from benchmarks.gpu import model
from benchmarks.gpu.counted import counts
from benchmarks.gpu.model_peers import grouped, own
from moeopt.ir.specs import ExpertsSpec

H100 = model.GPUS["h100"]


def in_a_graph(c, log):
    return sum(model.seconds(one, c, H100) + H100.gap for one in log)


@pytest.mark.parametrize("block", model.BLOCKS)
def test_kernels_are_near_the_floor_of_weights_and_products(block):
    for T, most in ((1, 1.25), (4, 1.25), (16, 1.25), (64, 1.25), (512, 1.4), (4096, 1.7)):
        c = model.cell(block, T)
        log = model.launched(c, H100)
        # 1.4 is the aim at 4096 tokens too, which docs/performance.md says is missed there
        assert 1 <= in_a_graph(c, log) / model.floor(c, H100) <= most, T
        assert len(log) == (2 if len(log) < 4 else 4) <= (3 if T == 1 else 8)


def test_a_normed_token_takes_three_launches():
    c = model.cell("qwen3-30b-a3b", 1)
    names = [one.name for one in model.launched(c, H100, ExpertsSpec(rows="separate", out_norm_eps=1e-6))]
    assert names == ["gemv_in", "gemv_pair", "combine_normed"]


@pytest.mark.parametrize("block", ("qwen3-30b-a3b", "sixteen"))
def test_a_home_made_loop_is_launches_and_waits(block):
    for T, gain in ((1, 5), (512, 2)):
        c = model.cell(block, T)
        ours, loop = in_a_graph(c, model.launched(c, H100)), own(c, H100)
        assert loop.waits == c.E and loop.launches > 8 * c.hit
        assert loop.eager >= gain * ours


def test_transformers_grouped_mm_starts_more_and_moves_more():
    c = model.cell("qwen3-30b-a3b", 512)
    ours, library = in_a_graph(c, model.launched(c, H100)), grouped(c, H100)
    assert library.launches > 10 and library.waits == 0 and library.device > ours


def test_rows_are_read_again_where_all_tiles_run_before_the_next_columns():
    """Why programs are numbered as they are: what L2 can't hold would be read for each block of columns."""
    c = model.cell("qwen3-30b-a3b", 4096)
    out = model.launched(c, H100)[2]
    told = out._replace(constants={**out.constants, "TOGETHER": 1 << 20})
    grouped_order, all_rows_first = (
        model.read_by_tiles(one, c, H100, 1, c.I, c.H, rows_cached=False)[0] for one in (out, told)
    )
    assert all_rows_first > 1.5 * grouped_order


def test_bytes_and_launches_are_those_of_the_calls():
    def call(H, I):
        x, w, v = torch.ones(3, H), torch.ones(I, H), torch.ones(H, I)
        return lambda: ((x @ w.t()) * 2) @ v.t()

    launches, waits, moved = counts(call, 100 * 8, 10 * 8)
    assert (launches, waits) == (3, 0)
    # x in, a out; a in and out, the scalar is no tensor; a in, y out; without the weights
    assert moved == 4 * 3 * (800 + 80 + 80 + 80 + 80 + 800)
