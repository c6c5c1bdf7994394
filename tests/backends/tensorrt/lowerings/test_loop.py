"""The loop form: one turn for each expert, whose body has two matmuls."""

from moeopt.backends.tensorrt.lowerings.loop import Loop
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of


def test_one_loop_over_the_experts():
    model = model_of(make_site(E=7), Loop())
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    assert int(loop.inputs[0].const_value.numpy()) == 7
    assert bool(loop.inputs[1].const_value.numpy()) is True  # without a condition TensorRT runs eight turns at a time
    inside = [node.op_type for node in loop.attributes["body"].as_graph()]
    assert inside.count("MatMul") == 2 and "MatMul" not in [node.op_type for node in model.graph]
