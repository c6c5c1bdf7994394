"""The dense form: two matmuls for any number of experts, and what it is refused."""

from moeopt.backends.tensorrt.lowerings.dense import Dense
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of


def test_two_products_for_any_number_of_experts():
    for E in (2, 64):
        assert Dense().refuses(make_site(E=E), "sm_89") == ""
        nodes = [node.op_type for node in model_of(make_site(E=E), Dense()).graph]
        assert nodes.count("MatMul") == 2 and "Loop" not in nodes


def test_refuses_weights_on_the_input_of_several_experts():
    assert "dense carries that for top_k 1 only" in Dense().refuses(make_site(weight_on="input"), "sm_89")
    assert Dense().refuses(make_site(weight_on="input", K=1), "sm_89") == ""
