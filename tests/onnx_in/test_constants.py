"""Constants that nodes of a file compute: each node is looked at once, and codes are rounded as ONNX Runtime does."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import moeopt
from moeopt.errors import UsageError
from moeopt.onnx_in import constants
from moeopt.onnx_in.constants import MOST_NODES, ConstantReader
from moeopt.onnx_in.operators.table import OPERATORS
from moeopt.onnx_in.read import read_onnx
from tests.onnx_in.coded_files import stored

OPSET = 23
WEIGHTS = (stored("codes", np.arange(16, dtype=np.int8).reshape(4, 4)), stored("scale", np.array(0.5, np.float32)))


def product(nodes, codes, weights=WEIGHTS, outputs=("y",), kinds=(TensorProto.FLOAT,)):
    """``x`` times the floats of ``codes``, which ``nodes`` make."""
    last = [
        helper.make_node("DequantizeLinear", [codes, "scale"], ["w"], name="dq"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
    ]
    ends = [helper.make_tensor_value_info(o, kind, None) for o, kind in zip(outputs, kinds, strict=True)]
    graph = helper.make_graph(
        [*nodes, *last], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 4])], ends, list(weights)
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def chain(op, count, reads=1):
    """``count`` nodes, each of which reads the one before it ``reads`` times."""
    names = ["codes", *(f"v{n}" for n in range(count))]
    return [helper.make_node(op, [a] * reads, [b], name=b) for a, b in zip(names, names[1:], strict=False)], names[-1]


def test_a_node_that_is_read_many_times_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setitem(OPERATORS, ("", "Max"), lambda call, run=OPERATORS["", "Max"]: calls.append(call) or run(call))
    nodes, last = chain("Max", 40, reads=30)
    value = list(read_onnx(product(nodes, last)).model.graph)[40].inputs[0]
    reader = ConstantReader(OPSET)
    assert reader.is_constant(value) and reader.read(value).sum() == 120 and len(calls) == 40
    y = moeopt.from_onnx(product(nodes, last))(torch.eye(4))
    assert torch.equal(y, torch.arange(16.0).reshape(4, 4) / 2)


def test_a_long_chain_is_read_up_to_a_number_of_nodes():
    y = moeopt.from_onnx(product(*chain("Identity", MOST_NODES - 2)))(torch.eye(4))
    assert torch.equal(y, torch.arange(16.0).reshape(4, 4) / 2)
    with pytest.raises(UsageError, match=f"or that over {MOST_NODES} nodes compute"):
        moeopt.from_onnx(product(*chain("Identity", MOST_NODES + 5)))


def test_an_operator_of_a_stranger_s_domain_is_not_taken_for_onnx_s():
    own = helper.make_node("Abs", ["codes"], ["a"], name="own", domain="own")
    with pytest.raises(UsageError, match=r"own\.Abs|on codes that are no constant"):
        moeopt.from_onnx(product([own], "a"))
    proto = product([], "codes")
    proto.graph.node[0].domain = "own"
    with pytest.raises(UsageError, match=r"the node 'dq' is own\.DequantizeLinear, which moeopt does not read"):
        moeopt.from_onnx(proto)


def test_codes_that_are_widened_are_of_the_wider_type():
    nodes = [
        helper.make_node("Cast", ["codes"], ["wide"], name="cast", to=TensorProto.INT32),
        helper.make_node("Transpose", ["wide"], ["turned"], name="turn", perm=[1, 0]),
    ]
    value = list(read_onnx(product(nodes, "turned")).model.graph)[2].inputs[0]
    assert ConstantReader(OPSET).kind(value) == "int32"


def rounded(name, **attributes):
    weights = [stored("floats", np.linspace(-3, 3, 16, dtype=np.float32).reshape(4, 4)), WEIGHTS[1]]
    weights.append(stored("zero", np.array(0, np.int8)))
    return [helper.make_node("QuantizeLinear", ["floats", "scale", "zero"], [name], name="q")], weights


def test_codes_that_the_file_makes_may_be_an_output_or_read_by_other_nodes():
    nodes, weights = rounded("codes")
    proto = product(nodes, "codes", weights, ("y", "codes"), (TensorProto.FLOAT, TensorProto.INT8))
    x = torch.eye(4)
    y, codes = moeopt.from_onnx(proto)(x)
    want = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x.numpy()})
    assert codes.dtype == torch.int8 and torch.equal(codes, torch.from_numpy(want[1]))
    assert torch.allclose(y, torch.from_numpy(want[0]), rtol=1e-6, atol=0)
    nodes.append(helper.make_node("Cast", ["codes"], ["plain"], name="cast", to=TensorProto.FLOAT))
    proto = product(nodes, "codes", weights, ("y", "plain"), (TensorProto.FLOAT, TensorProto.FLOAT))
    assert torch.equal(moeopt.from_onnx(proto)(x)[1], codes.float())


KINDS = {
    "int8": (TensorProto.INT8, -128, 127), "uint8": (TensorProto.UINT8, 0, 255), "int4": (TensorProto.INT4, -8, 7),
    "uint4": (TensorProto.UINT4, 0, 15),
}  # fmt: skip


def quantised(x, scale, kind, opset, domain="", **attributes):
    """The codes that ONNX Runtime makes of constants, and those that are read here."""
    number, low, high = KINDS[kind]
    zero = np.full(scale.shape, (low + high) // 2)
    zero = stored("zero", zero, number) if kind.endswith("4") else stored("zero", zero.astype(kind))
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "zero"], ["q"], name="q", axis=1, domain=domain, **attributes),
        helper.make_node("Cast", ["q"], ["codes"], name="cast", to=TensorProto.INT32),
    ]
    end = helper.make_tensor_value_info("codes", TensorProto.INT32, None)
    graph = helper.make_graph(nodes, "g", [], [end], [stored("w", x), stored("s", scale), zero])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    value = next(iter(read_onnx(proto).model.graph)).outputs[0]
    want = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {})[0]
    return torch.from_numpy(want), ConstantReader(opset).read(value).to(torch.int32)


@pytest.mark.parametrize("said", [{"opset": 21}, {"opset": 23}, {"opset": 23, "precision": 1}, {"opset": 24}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_file_s_own_rounding_is_onnx_runtime_s_to_the_bit(dtype, kind, said):
    draw = np.random.default_rng(7)
    scale = (0.01 + draw.random(96)).astype(dtype)
    wide = 60 if kind.endswith("8") else 4
    x = (draw.normal(size=(400, 96)) * wide * scale).astype(dtype)
    x[:5, 0] = [np.nan, np.inf, -np.inf, 0, -0.0]
    scale[1] = 0  # 0 / 0 and infinities
    x[0, 1] = 0
    want, found = quantised(x, scale, kind, **said)
    assert torch.equal(found, want)


def test_a_precision_that_is_not_read_is_told():
    nodes, weights = rounded("codes")
    nodes[0].attribute.append(helper.make_attribute("precision", int(TensorProto.BFLOAT16)))
    with pytest.raises(UsageError, match="in blocks, of a type or in a precision that is not read"):
        moeopt.from_onnx(product(nodes, "codes", weights))


def test_what_is_no_constant_is_told_apart_without_a_walk_through_the_graph():
    """A value that an input feeds: as many nodes are looked at as lie nearest."""
    nodes = [helper.make_node("Add", ["x" if n == 0 else f"a{n - 1}", "scale"], [f"a{n}"]) for n in range(2000)]
    file = read_onnx(product([*nodes, helper.make_node("Neg", ["a1999"], ["far"])], "codes"))
    value = next(n for n in file.model.graph if n.op_type == "Neg").outputs[0]
    seen = []
    real = constants._is_run
    constants._is_run = lambda node: seen.append(node) or real(node)
    try:
        assert not ConstantReader(OPSET).is_constant(value)
    finally:
        constants._is_run = real
    assert len(seen) <= MOST_NODES + 1


def test_a_rounding_of_the_runtime_s_own_domain_is_its_too():
    draw = np.random.default_rng(8)
    scale = (0.01 + draw.random(96)).astype(np.float16)
    x = (draw.normal(size=(400, 96)) * 60 * scale).astype(np.float16)
    want, found = quantised(x, scale, "int8", 23, "com.microsoft")
    assert torch.equal(found, want)
