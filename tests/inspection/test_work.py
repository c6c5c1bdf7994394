"""Memory, roofline, devices and the table: numbers against sums by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import moeopt
from moeopt.inspection import devices
from moeopt.inspection.devices import GPUS, Device, find_device, memory, this_machine
from moeopt.inspection.memory import fits
from moeopt.inspection.render import amount, billions
from moeopt.inspection.roofline import Part, bound, expected_hit
from tests.inspection.published import SHAPES
from tests.toy_moe import E, H, K, build, mixtral

HALF = Device("half", 1000.0, 10.0, 40.0)  # turns at 4 FLOPs per byte


def test_expected_distinct_experts():
    assert expected_hit(8, 2, 1) == pytest.approx(2)
    assert expected_hit(8, 8, 3) == 8
    assert expected_hit(8, 2, 4) == pytest.approx(8 * (1 - 0.75**4))


def test_the_formula_agrees_with_routing_at_random():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(4000, 5, 16, generator=g)  # runs, tokens, experts
    hit = torch.zeros(4000, 16).scatter_(1, scores.topk(3, -1).indices.flatten(1), 1.0).sum(1)
    standard_error = hit.std() / math.sqrt(4000)
    assert abs(hit.mean() - expected_hit(16, 3, 5)) < 4 * standard_error


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_flops_and_bytes_of_a_part(tokens):
    part = Part("ffn", always=600, row=50)
    assert part.flops(tokens) == 2 * 600 * tokens
    assert part.bytes(tokens, 0.5) == 300 + 2 * 50 * tokens
    routed = Part("experts", banks=[(800, 8, 2, 30)])
    assert routed.flops(tokens) == 2 * 100 * 2 * tokens
    assert routed.bytes(tokens, 2) == pytest.approx(200 * expected_hit(8, 2, tokens) + 2 * 30 * tokens)


def test_where_compute_begins_to_bound():
    part = Part("ffn", always=600, row=50)
    turn = bound(part, 1, 2, HALF).turns_at
    assert turn == 7  # 1200 T > 4 (1200 + 100 T) from T = 6.0 on, so the first is 7
    assert bound(part, turn, 2, HALF).by == "compute" and bound(part, turn - 1, 2, HALF).by == "bandwidth"
    assert bound(part, 1, 2, HALF).seconds == pytest.approx(1300 / 10)
    assert bound(Part("router", always=10, row=100), 1, 2, HALF).turns_at is None


def test_experts_turn_later_than_a_dense_part_of_their_size():
    dense = bound(Part("ffn", always=10**6), 1, 2, find_device("H100")).turns_at
    experts = bound(Part("experts", banks=[(10**6, 128, 8, 0)]), 1, 2, find_device("H100")).turns_at
    assert (dense, experts) == (296, 4726)  # 989.5 / 3.35 FLOPs a byte; times E / K, all experts being hit by then


def test_memory_at_each_width():
    rows = {f.bits: f for f in fits(1000, Device("d", 1500.0, 1.0, 1.0))}
    assert [f.bytes for f in rows.values()] == [4000, 2000, 1000, 500]
    assert [f.devices for f in rows.values()] == [3, 2, 1, 1]
    assert [f.fits for f in rows.values()] == [False, False, True, True]
    assert rows[16].short_by == 500 and rows[8].to_dict()["free_bytes"] == 500


def test_devices_by_name():
    assert find_device("nvidia h100").name == find_device("H100-SXM").name == "H100-SXM"
    assert len({d.name for d in GPUS}) == len(GPUS)
    for device in GPUS:
        assert device.source.startswith("https://") and 100 < device.ridge < 500 or device.name == "L4", device.name


def test_this_machine_is_measured(monkeypatch):
    """By a clock of the test's own: the quickest of the calls, of which there are at least two."""
    clock = iter((0.0, 1.0, 1.5, 2.0, 2.25, 9.0))
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert devices._best(lambda: None, 0.1) == 0.25
    monkeypatch.setattr(devices, "_best", lambda call, seconds: 0.25)
    device = this_machine()
    assert device.measured and device.memory == memory() > 1e8
    assert device.bandwidth == 256 * 2**20 / 0.25 and device.flops == 2 * 1024**3 / 0.25


def test_work_of_a_block():
    found = moeopt.inspect(build(), batch=3, prompt=5, device="H100", bits=32)
    assert (found.prefill.tokens, found.decode.tokens) == (15, 3)
    per_token = found.to_dict()["per_token"]
    assert per_token["decode"]["flops"] == pytest.approx(2 * (K * 3 * H * H + E * H))
    assert per_token["decode"]["experts_hit"] == pytest.approx(expected_hit(E, K, 3))
    weights = 4 * (3 * H * H * expected_hit(E, K, 3) + E * H)
    rows = 2 * (K * 5 * H + E + H)
    assert per_token["decode"]["bytes"] == pytest.approx(weights / 3 + rows)


FIXED = ("layers", "experts", "top_k", "shared_experts", "router", "params", "memory", "per_token")


@pytest.mark.parametrize("dense", [False, True])
def test_json_has_the_fixed_keys(dense):
    from transformers import LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    found = moeopt.inspect(LlamaConfig(**sizes) if dense else mixtral(), device="H100")
    data = json.loads(found.to_json())
    assert set(FIXED) <= set(data) and data["layers"] == 2
    assert set(data["params"]["active"]) == {"all", "no_input_embedding", "no_embeddings"}
    assert set(data["per_token"]) >= {"prefill", "decode"} and set(data["memory"]["bits"]) == {"32", "16", "8", "4"}
    if dense:
        assert (data["experts"], data["top_k"], data["shared_experts"], data["router"]) == (0, 0, 0, None)
        assert data["params"]["active"]["all"] == data["params"]["total"]
        assert (
            "no mixture of experts found: a dense model" in str(found) and "per token" not in str(found).split("\n")[3]
        )
    else:
        assert (data["experts"], data["top_k"], data["router"]) == (4, 2, "softmax, top-2 of 4, renormalised")


@pytest.mark.parametrize("device", ["H100", None])
@pytest.mark.parametrize("name", ["DeepSeek-V3", "Llama 4 Maverick"])
def test_the_table_has_80_columns(name, device):
    lines = str(moeopt.inspect(SHAPES[name].fields, device=device, batch=4096, prompt=100_000)).splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_amounts():
    assert [amount(x, "B") for x in (0, 12, 999.9, 1e3, 12.34e9, 2.684e12)] == [
        "0 B", "12 B", "1 kB", "1 kB", "12.3 GB", "2.68 TB"
    ]  # fmt: skip
    assert [billions(n) for n in (None, 1234, 46_702_792_704)] == ["?", "1,234", "46.703 B"]
