"""The dense lowering: two matmuls for any E, and what it is refused."""

from moeopt.backends.onnxrt.lowerings import by_name
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of


def test_two_products_whatever_the_experts():
    for E in (2, 16):
        nodes = list(model_of(make_site(E=E), "dense").graph)
        assert sum(node.op_type == "MatMul" for node in nodes) == 2 and len(nodes) <= 30


def test_refuses_many_experts_and_weights_on_the_input():
    assert "dense computes every expert; 17 are more than 16" in by_name("dense").refuses(make_site(E=17), "cpu")
    reason = by_name("dense").refuses(make_site(weight_on="input"), "cpu")
    assert "dense carries that for top_k 1 only" in reason
    assert by_name("dense").refuses(make_site(weight_on="input", K=1), "cpu") == ""


def test_tensorrt_takes_dense_and_not_unrolled():
    assert by_name("dense").refuses(make_site(), "tensorrt") == ""
    assert "sizes are known only at run time" in by_name("unrolled").refuses(make_site(), "tensorrt")
