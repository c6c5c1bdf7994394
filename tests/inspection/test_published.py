"""The published shapes: structure and counts reproduced; `benchmarks/optimize_cost.py inspect` has what that costs."""

import pytest

import moeopt
from tests.inspection.published import SHAPES

pytest.importorskip("transformers", "5.0")


@pytest.mark.parametrize("name", SHAPES)
def test_structure_and_counts(name):
    want = SHAPES[name]
    found = moeopt.inspect(want.fields, device="H100-SXM").to_dict()
    assert (found["layers"], found["moe_layers"]) == want.layers
    assert (found["experts"], found["top_k"], found["shared_experts"]) == (want.experts, want.top_k, want.shared)
    assert found["router"] == want.router and len(found["kinds"]) == 1
    total, active, convention = want.exact
    used = found["params"]["active"][convention] / 1e9
    assert abs(found["params"]["total"] / 1e9 - total) < 0.0006 and abs(used - active) < 0.0006
    for got, text in ((total, want.total), (used, want.active)):  # as published, rounded to as many digits
        assert any(f"{got:.{len(t.partition('.')[2])}f}" == t for t in text.split("|"))


def test_mixtral_at_16_bits_is_93_gigabytes():
    found = moeopt.inspect(SHAPES["Mixtral 8x7B"].fields, device="H100").to_dict()
    row = found["memory"]["bits"]["16"]
    assert round(row["bytes"] / 1e9) == 93 and not row["fits"]
    assert row["devices"] == 2 and row["short_by_bytes"] == row["bytes"] - 80 * 10**9


def test_a_quantised_checkpoint_is_counted_as_the_model_it_stands_for():
    found = moeopt.inspect(SHAPES["gpt-oss-20b"].fields, device="L4")
    assert "the checkpoint is quantised (mxfp4)" in found.notes[0]


def test_a_model_type_of_its_own_is_built_as_the_class_that_its_config_names():
    found = moeopt.inspect(SHAPES["Kimi K2"].fields, device="H100")
    assert "model_type 'kimi_k2' is not transformers' own; built as DeepseekV3ForCausalLM" in found.notes[0]
