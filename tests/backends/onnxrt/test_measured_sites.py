"""What is timed in a graph's place costs what it costs: as many rows an expert, and all experts that stay idle."""

import pytest
import torch

from moeopt.backends.onnxrt import measured_sites as sites
from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.plan import session_of
from moeopt.ir.weight_format import FORMATS
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from tests.backends.onnxrt.lowerings.one_site import make_site

SPECS = [
    {},
    {"rows": "plain"},
    {"rows": "separate"},
    {"w_in_layout": "io", "w_out_layout": "io"},
    {"rows": "interleaved", "w_out_layout": "io", "out_norm_eps": 1e-6},
]


def hit(run):
    """Experts that a run reads, and rows of each."""
    return run.feeds["ids"].flatten().bincount()


@pytest.mark.parametrize("changes", SPECS, ids=str)
@pytest.mark.parametrize("T", [1, 3, 24, 240])
def test_as_many_experts_are_hit_with_as_many_rows_and_the_rest_is_idle(changes, T, monkeypatch):
    site = make_site(E=24, K=4, bias=False, **changes)
    one = sum(w.numel() for w in (*site.bank.w_in(0), site.bank.w_out(0)))
    monkeypatch.setattr(sites, "BYTES", 6 * 4 * one)
    monkeypatch.setattr(sites, "MOST_RUNS", 1000)
    ((few, *idle),) = sites.measured_calls(site, [T])
    assert few.block.bank.num_experts == 6 and few.block.features == site.features
    rows = hit(few)[hit(few) > 0]
    assert few.times * int(rows.sum()) == 4 * T
    assert int(rows.max()) <= max(1, -(-4 * T // 24)), "an expert of the block has no more rows in the mean"
    experts = few.times * 6 + sum(run.block.bank.num_experts for run in idle)
    assert experts == 24 if idle else experts >= 24
    for run in (few, *idle):
        for name in ("unrolled", "native"):
            lowering = by_name("unrolled") if name == "unrolled" else sites_native()
            if not lowering.refuses(run.block, "cpu"):
                (y,) = session_of(run.block, lowering).run(run.feeds)
                assert y.shape == run.feeds["x"].shape and torch.isfinite(y).all()


def sites_native():
    from moeopt.backends.onnxrt.lowerings.native import Native
    from tests.backends.onnxrt.native import needs_operator

    needs_operator()
    return Native(by_name("unrolled"))


def test_a_long_call_is_timed_in_proportion(monkeypatch):
    site = make_site(E=64, K=2, bias=False)
    one = sum(w.numel() for w in (*site.bank.w_in(0), site.bank.w_out(0)))
    monkeypatch.setattr(sites, "BYTES", 2 * 4 * one)
    ((few, idle),) = sites.measured_calls(site, [20])  # 40 experts are hit, 24 are not
    assert (few.times, idle.block.bank.num_experts) == (8, round(24 * 8 / 20))


def test_a_small_block_is_timed_whole():
    site = make_site()
    calls = sites.measured_calls(site, [1, 7])
    assert [[(run.block.bank.num_experts, len(run.feeds["x"]), run.times) for run in call] for call in calls] == [
        [(5, 1, 1)],
        [(5, 7, 1)],
    ]


@pytest.mark.parametrize("name", ["int8-block32", "int4", "fp8"])
def test_codes_stay_codes(name, monkeypatch):
    site = make_site(E=12, K=2, H=64, I=64, bias=False)
    bank = site.bank
    w_in = [
        QuantizedMatrices.of([quantize(bank.w_in(e)[i], FORMATS[name]) for e in range(12)])
        for i in range(len(bank.w_in(0)))
    ]
    w_out = QuantizedMatrices.of([quantize(bank.w_out(e), FORMATS[name]) for e in range(12)])
    site.bank = QuantizedExpertWeights(w_in, w_out)
    monkeypatch.setattr(sites, "BYTES", site.bank.nbytes // 3)
    ((few, idle),) = sites.measured_calls(site, [1])
    assert few.block.bank.num_experts == 4 and idle.block.bank.num_experts == 8
    assert all(run.block.bank.w_out_q.matrix.format == FORMATS[name] for run in (few, idle))
    for run in (few, idle):
        (y,) = session_of(run.block, by_name("unrolled-floats")).run(run.feeds)
        assert y.shape == run.feeds["x"].shape and torch.isfinite(y).all()
