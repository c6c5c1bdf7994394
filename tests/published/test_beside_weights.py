"""What a quantization_config asks for beside weights: told where it is asked for, and nowhere else."""

import pytest

from moeopt.published.beside_weights import rounded_at_each_call, turned_at_each_call


def groups(**group):
    return {"config_groups": {"g": {"weights": {"num_bits": 4}, **group}}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, ""),
        (groups(), ""),
        (groups(input_activations=None), ""),
        ({"config_groups": [1]}, ""),
        (groups(input_activations={"num_bits": 8, "dynamic": True}), "input_activations of 8 bits"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "activation_scheme 'dynamic'"),
        ({"quant_method": "fp8", "activation_scheme": None}, ""),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200}, "fbgemm_fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo 'FP8'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, ""),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, ""),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
        ({"global_quant_config": {"input_tensors": {"dtype": "fp8_e4m3"}}}, "input_tensors of fp8_e4m3"),
        ({"global_quant_config": {"input_tensors": None}}, ""),
    ],
)
def test_rounded_activations(config, said):
    assert rounded_at_each_call(config) == said


@pytest.mark.parametrize(
    ("location", "said"),
    [("input", "R1 (input)"), ("k_cache", "R1 (k_cache)"), ("weight_output", ""), (None, "R1 (None)")],
)
def test_turned_activations(location, said):
    for apply in ({"location": location}, [{"location": "weight_input"}, {"location": location}]):
        assert turned_at_each_call({"transform_config": {"config_groups": {"R1": {"apply": apply}}}}) == said
    assert not turned_at_each_call({"transform_config": {}}) and not turned_at_each_call({"transform_config": None})
