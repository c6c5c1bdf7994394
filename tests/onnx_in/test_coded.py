"""Weights that a file holds as codes: read as what ONNX Runtime makes of them, and kept by what is rewritten."""

import dataclasses
import weakref

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

import moeopt
from moeopt.errors import Declined
from moeopt.onnx_in.coded_nodes import CodedConstants
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.regions import candidate_regions
from moeopt.published import file_codes
from moeopt.published.experts import Unbound
from moeopt.published.file_codes import FileExperts, is_symmetric, matrix_of
from tests.onnx_in.coded_files import FORMS, Dequantised, E, H, I, Packed, coded_file, outputs_of, runs, stored


def read(proto):
    """The coded constants of a file, by the names of the values that have their floats."""
    codes = CodedConstants(21)
    for node in read_onnx(proto).model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMulNBits"):
            codes.read(node)
    return codes.found


@pytest.mark.parametrize("form", FORMS)
def test_the_floats_are_what_onnx_runtime_makes_of_the_codes(form):
    proto = coded_file(FORMS[form])
    found = read(proto)
    assert len(found) == 3 * E
    for name, one in list(found.items())[:3]:
        if isinstance(FORMS[form], Packed):  # a row of the identity for each input
            made = name.removesuffix(".floats")
            node = next(n for n in proto.graph.node if made in n.output)
            eye = np.eye(one.floats.shape[1], dtype=np.float32)
            ends = [helper.make_tensor_value_info(n, 1, None) for n in ("x", made)]
            node.input[0] = "x"
            alone = helper.make_graph([node], "g", ends[:1], ends[1:], list(proto.graph.initializer))
            want = runs(helper.make_model(alone, opset_imports=proto.opset_import, ir_version=10), eye).T
        else:
            alone = outputs_of(proto, [name])
            del alone.graph.output[0]
            want = runs(alone, np.zeros((1, H), np.float32))
        assert torch.equal(one.floats, torch.from_numpy(want.copy()))


@pytest.mark.parametrize("form", FORMS)
def test_a_view_of_the_floats_has_the_same_view_of_the_codes(form):
    for one in list(read(coded_file(FORMS[form])).values())[:3]:
        floats, codes = one.floats, one.codes().contiguous()
        for w in (floats, floats.t(), floats[16:, 16:], floats.t()[3:, 16:], floats[::2], floats[1:2], floats[:, :16]):
            for symmetric in {is_symmetric(one), form == "e4m3"}:
                made = matrix_of(one, codes, w, symmetric)
                assert torch.equal(made.dequantize(torch.float32), w)


def test_blocks_that_do_not_lie_side_by_side_are_no_bank_s():
    one = list(read(coded_file(FORMS["int8, blocks"])).values())[2]
    with pytest.raises(Unbound, match="the scales of the node 'experts.0.down.w.dq' are in blocks that no bank"):
        matrix_of(one, one.codes(), one.floats.t()[:, 3:], True)


def test_plain_floats_have_no_codes_and_half_of_them_none_that_are_kept():
    one = next(iter(read(coded_file(FORMS["int8"])).values()))
    plain = torch.randn(I, H)
    assert FileExperts([one]).bank("mlp", 1, lambda e: [plain, plain.t()]) is None
    with pytest.raises(Unbound, match="a weight of expert 0 of mlp is plain floats, beside others that are codes"):
        FileExperts([one]).bank("mlp", 1, lambda e: [one.floats, plain.t()])


@pytest.mark.sample(3)
@pytest.mark.parametrize("form", FORMS)
def test_experts_keep_their_codes(form, tmp_path):
    onnx.save(coded_file(FORMS[form], width=80), tmp_path / "m.onnx")
    found = moeopt.optimize(tmp_path / "m.onnx", verify="fast")
    assert [(b.status, b.experts, b.top_k) for b in found.report.blocks] == [("rewritten", E, 2)]
    assert found.certificate.passed and found.certificate.equivalent and not found.certificate.loss
    assert any("have the codes of the file" in note and "nothing is lost" in note for note in found.report.notes)
    x = np.random.default_rng(3).normal(size=(7, H)).astype(np.float32)
    want = torch.from_numpy(runs(onnx.load(tmp_path / "m.onnx"), x))
    assert torch.allclose(found(torch.from_numpy(x)), want, rtol=1e-5, atol=1e-5)
    bundle = found.save(tmp_path / "bundle")
    held = sum(file.stat().st_size for file in bundle.glob("model.onnx*"))
    narrow = "4 bits" in form or "int4" in form
    assert held < 3 * E * 80 * H * (2.2 if narrow else 3)  # of 4 bytes a weight as floats
    assert moeopt.verify(bundle, original=tmp_path / "m.onnx").passed


def test_codes_of_4_bits_stay_codes_in_memory_with_zero_points_too(tmp_path):
    onnx.save(coded_file(FORMS["4 bits, zero points"]), tmp_path / "m.onnx")
    found = moeopt.optimize(tmp_path / "m.onnx", verify="fast")
    assert "unrolled-codes" in found.report.blocks[0].lowering
    bundle = found.save(tmp_path / "bundle")
    nodes = [
        n for n in onnx.load(bundle / "model.onnx", load_external_data=False).graph.node if n.op_type == "MatMulNBits"
    ]
    assert len(nodes) == 3 * E and all(len(n.input) == 4 for n in nodes)
    assert not any(a.name == "accuracy_level" and a.i == 4 for n in nodes for a in n.attribute)
    assert moeopt.load(bundle) is not None


def test_a_router_of_codes_becomes_floats_and_that_is_told():
    proto = coded_file(FORMS["4 bits"], router=True)
    found = moeopt.optimize(proto, verify="fast")
    assert [(b.status, b.experts, b.top_k) for b in found.report.blocks] == [("rewritten", E, 2)]
    assert any("MB of floats stand where blocks had other weights as codes" in note for note in found.report.notes)
    x = np.random.default_rng(5).normal(size=(6, H)).astype(np.float32)
    assert torch.allclose(found(torch.from_numpy(x)), torch.from_numpy(runs(proto, x)), rtol=1e-5, atol=1e-5)


def three_layers():
    """Experts of three products: a function of a row that has no bank of codes."""
    proto = coded_file(FORMS["int8"])
    draw, nodes = np.random.default_rng(6), []
    for node in proto.graph.node:
        if node.op_type == "MatMul" and node.output[0].endswith(".down"):
            name = node.output[0]
            made, held = FORMS["int8"](f"{name}.last", (draw.normal(size=(H, H)) * H**-0.5).astype(np.float32))
            proto.graph.initializer.extend(held)
            node.output[0] = f"{name}.inner"
            nodes += [node, helper.make_node("Tanh", [f"{name}.inner"], [f"{name}.tanh"], name=f"{name}.tanh"), *made]
            nodes.append(helper.make_node("MatMul", [f"{name}.tanh", f"{name}.last"], [name], name=f"{name}.mm"))
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def test_experts_that_would_lose_their_codes_are_left_alone():
    found = moeopt.optimize(three_layers(), verify="fast")
    (block,) = [b for b in found.report.blocks if b.kind == "moe"]
    assert block.status == "declined"
    assert "the file holds its experts as codes, and they would become floats" in block.reason
    assert block.reason.endswith("; optimise the file from before it was quantised"), "and no other export of the file"
    assert "a function of a row of their own" in block.reason and "it was quantised" in block.reason


def picked(proto):
    """Codes that data pick: those of an expert, by a number that the graph's input says."""
    nodes = [
        helper.make_node("Gather", ["codes", "number"], ["one"], name="pick"),
        helper.make_node("DequantizeLinear", ["one", "scale"], ["w"], name="late"),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = [stored("codes", np.zeros((E, H, H), np.int8)), stored("scale", np.array(0.1, np.float32))]
    ends = [helper.make_tensor_value_info(n, kind, None) for n, kind in (("x", 1), ("number", 7), ("y", 1))]
    graph = helper.make_graph(nodes, "g", ends[:2], ends[2:], weights)
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=10)


def changed(form, **attributes):
    return coded_file(Packed(4, **attributes) if form is None else form)


def with_input(number, tensor):
    proto = coded_file(FORMS["4 bits"])
    proto.graph.initializer.append(tensor)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            node.input.extend([""] * (number - len(node.input)) + [tensor.name])
    return proto


UNREAD = {
    "level": (
        lambda: changed(None, accuracy_level=4),
        "at accuracy_level 4: ONNX Runtime rounds the rows that it multiplies to int8",
    ),
    "order": (
        lambda: with_input(4, stored("order", np.zeros(H, np.int32))),
        "with g_idx: its weights share scales in an",
    ),
    "float zeros": (
        lambda: with_input(3, stored("zeros", np.full((I, 2), 8, np.float32))),
        "with zero points of torch.float32: moeopt reads those that are codes themselves",
    ),
    "picked": (
        lambda: picked(coded_file(FORMS["int8"])),
        "on codes that are no constant, like those of experts that data",
    ),
}


@pytest.mark.parametrize("why", UNREAD)
def test_codes_that_are_not_read_are_told_by_the_node(why):
    make, said = UNREAD[why]
    with pytest.raises(Declined) as caught:
        read(make())
    assert said in caught.value.reason and "the node '" in caught.value.reason
    assert "optimise the" in caught.value.reason


def test_accuracy_level_4_declines_the_block_by_name(tmp_path):
    onnx.save(coded_file(Packed(4, accuracy_level=4)), tmp_path / "m.onnx")
    (block,) = moeopt.optimize(tmp_path / "m.onnx", verify="fast").report.blocks
    assert block.status == "declined" and "the node 'experts.0.gate.nbits' is com.microsoft.MatMulNBits" in block.reason
    assert "rounds the rows that it multiplies to int8" in block.reason


def test_a_whole_file_of_codes_is_a_module_of_floats():
    proto = coded_file(Dequantised("int4", axis=0, block=16))
    x = np.random.default_rng(4).normal(size=(6, H)).astype(np.float32)
    made = moeopt.from_onnx(proto)
    assert torch.allclose(made(torch.from_numpy(x)), torch.from_numpy(runs(proto, x)), rtol=1e-5, atol=1e-5)


def test_codes_of_one_expert_at_a_time_are_held_unpacked(monkeypatch):
    """Each constant is unpacked once and its zero points are looked at once; a stack stays for all of its experts."""
    held, most, asked = weakref.WeakSet(), [], []

    def watched(one):
        def codes():
            made = one.codes().clone()
            held.add(made.untyped_storage())
            most.append(len(held))
            return made

        return dataclasses.replace(one, codes=codes)

    monkeypatch.setattr(file_codes, "is_symmetric", lambda one: asked.append(one) or is_symmetric(one))
    found = [watched(one) for one in read(coded_file(FORMS["4 bits"])).values()]
    floats = [[one.floats for one in found[3 * e : 3 * e + 3]] for e in range(E)]
    bank, same = FileExperts(found).bank("mlp", E, floats.__getitem__)
    assert bank is not None and same and len(most) == len(asked) == 3 * E and max(most) <= 6
    stacked = found[:1]
    halves = stacked[0].floats.chunk(3)
    most.clear()
    FileExperts(stacked).bank("mlp", 3, lambda e: [halves[e], halves[e].t()])
    assert len(most) == 1


class HalfScales(Dequantised):
    """Scales of float16, whose products a ``Cast`` widens: the weights are rounded in between."""

    def __call__(self, name, w):
        nodes, weights = super().__call__(f"{name}.half", w)
        for tensor in weights:
            if tensor.name.endswith(".scale"):
                tensor.CopyFrom(stored(tensor.name, onnx.numpy_helper.to_array(tensor).astype(np.float16)))
        return [*nodes, helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.cast", to=1)], weights


class TwoBits(Packed):
    def bytes(self, codes):
        return codes[..., ::4] | codes[..., 1::4] << 2 | codes[..., 2::4] << 4 | codes[..., 3::4] << 6


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (HalfScales("int8", axis=1), "rounds what the codes stand for to half precision, and a Cast widens it again"),
        (TwoBits(2), "nbits' has codes of 2 bits (torch.uint8), which experts have no format for"),
    ],
)
def test_codes_that_experts_cannot_have_are_told_and_are_floats_of_a_module(form, said):
    proto = coded_file(form)
    (block,) = moeopt.optimize(proto, verify="fast").report.blocks
    assert (block.status, block.experts) == ("declined", E) and said in block.reason
    assert "the file holds its experts as codes, and they would become floats" in block.reason
    x = np.random.default_rng(4).normal(size=(6, H)).astype(np.float32)
    want = torch.from_numpy(runs(proto, x))
    assert torch.allclose(moeopt.from_onnx(proto)(torch.from_numpy(x)), want, rtol=1e-4, atol=1e-5)


def test_experts_of_the_same_codes_with_scales_of_their_own_are_experts():
    proto, codes = coded_file(FORMS["int8, a scale a column"]), {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            node.input[0] = codes.setdefault(node.name.split(".")[2], node.input[0])
    (found,) = candidate_regions(GraphIndex(read_onnx(proto).model.graph))
    assert found.chains.experts == E
    assert [b.experts for b in moeopt.optimize(proto, verify="fast").report.blocks if b.kind == "moe"] == [E]


def test_without_moeopt_s_entry_onnx_runtime_rounds_rows_of_a_file_that_says_nothing_of_it():
    proto = coded_file(FORMS["int4, blocks"])
    x = np.random.default_rng(3).normal(size=(7, H)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    plain = onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})[0]
    want = moeopt.from_onnx(proto)(torch.from_numpy(x)).numpy()
    assert np.abs(plain - want).max() > 1e-3 * np.abs(want).max()
    assert np.abs(runs(proto, x) - want).max() < 1e-5 * np.abs(want).max()
