"""Blocks that are one operator already, or stand in a body, are listed with the reason and the node's name."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import moeopt
from moeopt.errors import UsageError
from tests.onnx_in.long_graph import model

E, H, I = 4, 8, 16


def moe_file(path):
    """A com.microsoft.MoE behind a gate."""
    draw = np.random.default_rng(0)
    arrays = {
        "gate": draw.normal(size=(H, E)), "w1": draw.normal(size=(E, I, H)), "w2": draw.normal(size=(E, H, I)),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["logits"], name="gate_mm"),
        helper.make_node(
            "MoE", ["x", "logits", "w1", "", "w2"], ["y"], name="/layer/moe", domain="com.microsoft", k=2,
            activation_type="relu", normalize_routing_weights=1,
        ),
    ]  # fmt: skip
    return saved(path, nodes, arrays, [helper.make_opsetid("com.microsoft", 1)])


def loop_file(path):
    """Two dense experts, summed, in the body of an If that its caller decides on."""
    draw = np.random.default_rng(0)
    arrays = {f"{w}{e}": draw.normal(size=s) for e in range(2) for w, s in (("up", (H, I)), ("down", (I, H)))}
    body = []
    for e in range(2):
        body += [
            helper.make_node("MatMul", ["x", f"up{e}"], [f"h{e}"], name=f"up{e}"),
            helper.make_node("Relu", [f"h{e}"], [f"a{e}"], name=f"act{e}"),
            helper.make_node("MatMul", [f"a{e}", f"down{e}"], [f"o{e}"], name=f"down{e}"),
        ]
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    then = helper.make_graph([*body, helper.make_node("Add", ["o0", "o1"], ["z"], name="sum")], "then", [], [out])
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z2"])], "else", [], [helper.make_tensor_value_info("z2", 1, None)]
    )
    branch = helper.make_node("If", ["flag"], ["y"], name="choose", then_branch=then, else_branch=other)
    return saved(path, [branch], arrays, [], [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])])


def saved(path, nodes, arrays, opsets, takes=()):
    weights = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", H]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", [*ends[:1], *takes], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), *opsets], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("make", "name", "experts", "said"),
    [
        (moe_file, "layer.moe", E, "the node '/layer/moe' is com.microsoft.MoE: one operator for all experts"),
        (
            loop_file,
            "choose.region_0",
            2,
            "it stands in a body of the node 'choose' (If), and moeopt replaces blocks of the main",
        ),
    ],
)
def test_it_is_listed_with_the_reason(make, name, experts, said, tmp_path):
    found = moeopt.optimize(make(tmp_path / "m.onnx"))
    (block,) = found.report.blocks
    assert (block.name, block.status, block.experts) == (name, "declined", experts)
    assert said in block.reason
    assert any("is left as it is" in note for note in found.report.notes)
    bundle = found.save(tmp_path / "out")
    assert moeopt.verify(bundle).passed


def qmoe_file(path):
    """A com.microsoft.QMoE: 4-bit codes of all experts in one operator."""
    draw = np.random.default_rng(0)
    size = 32
    codes = {"w1": (E, 2 * size, size // 2), "w2": (E, size, size // 2)}
    held = [numpy_helper.from_array(draw.integers(0, 255, shape).astype(np.uint8), n) for n, shape in codes.items()]
    scales = {"gate": (size, E), "s1": (E, 2 * size), "s2": (E, size)}
    held += [numpy_helper.from_array(draw.uniform(0, 0.1, shape).astype(np.float32), n) for n, shape in scales.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["logits"], name="gate_mm"),
        helper.make_node(
            "QMoE", ["x", "logits", "w1", "s1", "", "w2", "s2"], ["y"], name="/layer/qmoe", domain="com.microsoft",
            k=2, activation_type="swiglu", swiglu_fusion=1, expert_weight_bits=4,
        ),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", size]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def test_a_quantised_operator_of_all_experts_is_listed_too(tmp_path):
    (block,) = moeopt.optimize(qmoe_file(tmp_path / "q.onnx")).report.blocks
    assert (block.name, block.status, block.experts) == ("layer.qmoe", "declined", E)
    assert "the node '/layer/qmoe' is com.microsoft.QMoE: one operator for all experts" in block.reason


class Rows(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": np.ones((3, 2), np.float32)}]

    def get_next(self):
        return self.left.pop() if self.left else None


def by_the_quantiser(kind, path):
    """A layer of dense experts, quantised by ONNX Runtime's own tools."""
    source = str(path.with_name("float.onnx"))
    onnx.save(model(1), source)
    if kind == "MatMulNBits":
        tool = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=16, is_symmetric=True)
        tool.process()
        tool.model.save_model_to_file(str(path))
    elif kind == "dynamic":
        quantize_dynamic(source, path, weight_type=QuantType.QInt8)
    else:
        quantize_static(source, path, Rows(), quant_format=QuantFormat[kind], weight_type=QuantType.QInt8)
    return path


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("QDQ", "the node 'layers.0.norm_QuantizeLinear' is QuantizeLinear"),
        ("QOperator", "the node 'layers.0.up0_quant' is QLinearMatMul"),
        ("dynamic", "the node 'layers.0.up0_quant' is MatMulInteger"),
    ],
)
def test_experts_whose_activations_are_quantised_are_declined_by_the_node(kind, named, tmp_path):
    found = moeopt.optimize(by_the_quantiser(kind, tmp_path / "q.onnx"))
    (block,) = found.report.blocks
    assert (block.name, block.status, block.experts) == ("layers.0", "declined", E)
    assert block.reason.startswith(f"{named}: the block is quantised, and so are its activations, which are rounded to")
    assert "moeopt reads experts whose weights alone are codes" in block.reason
    assert "optimise the file from before it was quantised, or the PyTorch model with quantize=" in block.reason


def test_experts_that_the_quantiser_gave_codes_alone_are_rewritten(tmp_path):
    found = moeopt.optimize(by_the_quantiser("MatMulNBits", tmp_path / "q.onnx"), verify="fast")
    assert [(b.name, b.status, b.experts) for b in found.report.blocks] == [("layers.0", "rewritten", E)]
    assert found.certificate.passed and "MatMulNBits" in {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    assert moeopt.verify(found.save(tmp_path / "bundle"), original=tmp_path / "q.onnx").passed


def branches(condition="chosen", experts=3, otherwise="zero"):
    """Experts each in an ``If`` of its own, which asks whether a token chose it (or, of the input, anything else)."""
    draw, nodes, weights = np.random.default_rng(2), [], {"gate": draw_of((H, experts)), "zero": np.zeros(())}
    weights["half"] = np.full((), 0.5)
    nodes.append(helper.make_node("MatMul", ["x", "gate"], ["logits"], name="router"))
    nodes.append(helper.make_node("ArgMax", ["logits"], ["ids"], name="pick", axis=1))
    for e in range(experts):
        weights |= {f"experts.{e}.up": draw.normal(size=(H, I)), f"experts.{e}.down": draw.normal(size=(I, H))}
        number = numpy_helper.from_array(np.array([e]), f"number{e}")
        nodes.append(helper.make_node("Constant", [], [f"number{e}"], value=number))
        nodes.append(helper.make_node("Equal", ["ids", f"number{e}"], [f"mask{e}"], name=f"mask{e}"))
        nodes.append(helper.make_node("Cast", [f"mask{e}"], [f"share{e}"], to=TensorProto.FLOAT))
        source = f"share{e}" if condition == "chosen" else "x"
        nodes.append(helper.make_node("ReduceMax", [source], [f"most{e}"], keepdims=0))
        nodes.append(helper.make_node("Greater", [f"most{e}", "zero"], [f"is{e}"]))
        then = [
            helper.make_node("MatMul", ["x", f"experts.{e}.up"], ["h"], name=f"up{e}"),
            helper.make_node("Relu", ["h"], ["a"]),
            helper.make_node("MatMul", ["a", f"experts.{e}.down"], ["o"], name=f"down{e}"),
            helper.make_node("Mul", ["o", f"share{e}"], ["z"], name=f"part{e}"),
        ]
        end = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
        other = [helper.make_node("Mul", ["x", otherwise], ["z"], name=f"idle{e}")]
        nodes.append(
            helper.make_node(
                "If", [f"is{e}"], [f"part{e}"], name=f"if{e}", then_branch=helper.make_graph(then, "t", [], end),
                else_branch=helper.make_graph(other, "e", [], end),
            )
        )  # fmt: skip
    nodes.append(helper.make_node("Sum", [f"part{e}" for e in range(experts)], ["y"], name="sum"))
    return nodes, weights


def layer_of_branches(number, activation):
    """A layer of such experts from ``x`` or from the layer before it; its values have names of their own."""
    nodes, weights = branches()
    for one in [*nodes, *(inner for n in nodes for a in n.attribute for inner in a.g.node)]:
        one.op_type = activation if one.op_type == "Relu" else one.op_type
        for ends in (one.input, one.output):
            ends[:] = [{"x": f"h{number}", "y": f"h{number + 1}"}.get(n, f"layers.{number}.{n}") for n in ends]
        one.name = one.name and f"layers.{number}.{one.name}"
    for result in [end for n in nodes for a in n.attribute for end in a.g.output]:
        result.name = f"layers.{number}.{result.name}"
    return nodes, {f"layers.{number}.{name}": weight for name, weight in weights.items()}


def test_branches_beside_rewritten_ones_stay_where_their_own_block_is_declined(tmp_path):
    """Written out they would be taken always, and a result that is not finite would count."""
    (first, held), (second, more) = layer_of_branches(0, "Relu"), layer_of_branches(1, "Asinh")
    first[0].input[0] = "x"
    for node in [*first, *(inner for n in first for a in n.attribute for inner in a.g.node)]:
        node.input[:] = ["x" if name == "h0" else name for name in node.input]
    second.append(helper.make_node("Identity", ["h2"], ["y"]))
    found = moeopt.optimize(saved(tmp_path / "m.onnx", [*first, *second], held | more, []), verify="fast")
    assert [(b.status, b.experts) for b in found.report.blocks] == [("rewritten", 3), ("declined", 3)]
    assert "only as long as the expert's results are finite" in found.report.blocks[1].reason
    made = onnx.load(found.save(tmp_path / "out") / "model.onnx", load_external_data=False)
    assert [n.name for n in made.graph.node if n.op_type == "If"] == ["layers.1.if0", "layers.1.if1", "layers.1.if2"]


def draw_of(shape):
    return np.random.default_rng(3).normal(size=shape)


def test_experts_that_each_stand_in_a_branch_are_told_and_branches_that_ask_for_something_else_are_none(tmp_path):
    found = moeopt.optimize(saved(tmp_path / "m.onnx", *branches(otherwise="half"), []))
    (block,) = found.report.blocks
    assert (block.name, block.kind, block.status, block.experts) == ("experts", "moe", "declined", 3)
    assert "each of its experts stands in a branch of its own, like those of the nodes 'if0' and 'if1' (If)" in (
        block.reason
    )
    assert (
        "where the condition of the node 'if0' (If), the node 'is0' (Greater), says that no row chose the "
        "expert, its branches are not seen to give the same, but the node 'part0' (Mul) and the node 'idle0' (Mul)"
    ) in block.reason
    assert "Export the model without those branches" in block.reason
    assert not moeopt.optimize(saved(tmp_path / "n.onnx", *branches("x"), [])).report.blocks


def test_blocks_in_both_branches_have_names_of_their_own(tmp_path):
    path = loop_file(tmp_path / "m.onnx")
    proto = onnx.load(path)
    (branch,) = proto.graph.node
    then, other = branch.attribute if branch.attribute[0].name == "then_branch" else reversed(branch.attribute)
    other.g.CopyFrom(then.g)
    onnx.save(proto, path)
    names = [b.name for b in moeopt.optimize(path).report.blocks]
    assert len(set(names)) == 2 and all(n.startswith("choose.") and n.endswith("region_0") for n in names)
    assert any("_branch." in n for n in names)


def test_a_branch_is_told_where_the_whole_file_should_become_a_module(tmp_path):
    with pytest.raises(UsageError) as caught:
        moeopt.from_onnx(loop_file(tmp_path / "m.onnx"))
    assert "the node 'choose' is If, whose body is run or not as data say" in str(caught.value)
    assert "moeopt.optimize takes the file" in str(caught.value)
