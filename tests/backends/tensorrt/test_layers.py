"""The builder's log read: layers, the ONNX nodes behind them, and the planned memory."""

from moeopt.backends.tensorrt.layers import Layer, counted, in_block, read_log

LOG = """I: Total Activation Memory: 100 bytes
V: Layers:
Name: shapes, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
Name: a.experts/up_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,16] }], Metadata: [ONNX Layer: a.experts/up]
Name: fused, LayerType: kgen, In: [], Metadata: [ONNX Layer: a.experts/act][ONNX Layer: b.experts/act][ONNX Layer: n]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float
I: Total Activation Memory: 8500000 bytes
I: Total Weights Memory: 12928 bytes
"""


def test_layers_and_memory():
    facts = read_log(LOG)
    assert facts.layers == (
        Layer("shapes", "shape_call"),
        Layer("a.experts/up_1", "gemm", ("a.experts/up",)),
        Layer("fused", "kgen", ("a.experts/act", "b.experts/act", "n")),
    )
    assert (facts.activation_bytes, facts.weights_bytes) == (8_500_000, 12928)


def test_what_belongs_to_a_block():
    layers = read_log(LOG).layers
    assert [x.name for x in in_block(layers, "a.experts")] == ["a.experts/up_1", "fused"]
    assert [x.name for x in in_block(layers, "b.experts")] == ["fused"] and in_block(layers, "a") == []
    assert counted([*layers, layers[1]]) == {"gemm": 2, "kgen": 1, "shape_call": 1}


def test_a_log_without_them():
    facts = read_log("I: nothing to see\n")
    assert facts.layers == () and facts.activation_bytes is None
