"""The gather form: weights picked by id, and ids that name no expert."""

from moeopt.backends.tensorrt.lowerings.gather import Gather
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of


def test_each_weight_is_gathered_once():
    nodes = [node.op_type for node in model_of(make_site(bias=False), Gather()).graph]
    assert nodes.count("Gather") == 2 and nodes.count("MatMul") == 2
