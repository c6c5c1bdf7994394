"""Coded nodes whose parts contradict each other are refused by the node's name, never read short, never a traceback."""

import random

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import moeopt
from moeopt.errors import MoeoptError, UsageError
from tests.onnx_in.coded_files import FORMS, E, H, I, Packed, coded_file, runs, stored

ENDING = "which do not go together: the file was damaged or edited"


def first(proto, op_type):
    return next(n for n in proto.graph.node if n.op_type == op_type)


def attribute(form, op_type, **values):
    """A file whose first coded node says something else."""
    proto = coded_file(FORMS[form])
    node = first(proto, op_type)
    for name, value in values.items():
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return proto


def weight(form, op_type, number, change):
    """A file whose first coded node has another input ``number``."""
    proto = coded_file(FORMS[form])
    name = first(proto, op_type).input[number]
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(stored(name, change(numpy_helper.to_array(tensor))))
    return proto


def without(form, op_type, number):
    proto = coded_file(FORMS[form])
    first(proto, op_type).input[number] = ""
    return proto


DAMAGED = {
    "K too large": (lambda: attribute("4 bits", "MatMulNBits", K=H + 1), f"K={H + 1}, N={I}, 4 bits in blocks of 16"),
    "K far too large": (lambda: attribute("8 bits", "MatMulNBits", K=1 << 40), "8 bits in blocks of 16, and codes of"),
    "N": (lambda: attribute("4 bits", "MatMulNBits", N=I // 2), f"N={I // 2}, 4 bits in blocks of 16, and codes of"),
    "bits": (lambda: attribute("4 bits", "MatMulNBits", bits=8), "8 bits in blocks of 16, and codes of uint8"),
    "signed bytes": (lambda: weight("4 bits", "MatMulNBits", 1, lambda a: a.astype(np.int8)), "and codes of int8"),
    "few scales": (lambda: weight("4 bits", "MatMulNBits", 2, lambda a: a[:-1]), f"scales of [{I - 1}, 2]"),
    "few zero points": (
        lambda: weight("4 bits, zero points", "MatMulNBits", 3, lambda a: a[:-1]), f"for {I} rows of 1 blocks",
    ),
    "text": (lambda: attribute("4 bits", "MatMulNBits", K="many"), "codes, scales and attributes (ValueError: invalid"),
    "axis": (lambda: attribute("int8, blocks", "DequantizeLinear", axis=5), "(axis 5, blocks of 16)"),
    "blocks": (lambda: attribute("int4, blocks", "DequantizeLinear", block_size=7), "(axis 0, blocks of 7)"),
    "two types": (
        lambda: weight("uint8, zero points", "DequantizeLinear", 2, lambda a: a.astype(np.int8)),
        "codes of uint8 and zero points of int8",
    ),
    "one zero point": (
        lambda: weight("uint8, zero points", "DequantizeLinear", 2, lambda a: a[:1]),
        f"1 zero points and {I} scales",
    ),
    "axis in words": (
        lambda: attribute("int8, a scale a column", "DequantizeLinear", axis="last"),
        "codes, scales and attributes (ValueError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_parts_that_do_not_go_together_are_told_by_the_node(what):
    make, said = DAMAGED[what]
    with pytest.raises(UsageError) as caught:
        moeopt.from_onnx(make())
    message = str(caught.value)
    assert said in message and ENDING in message and "the node 'experts.0.gate" in message


@pytest.mark.parametrize(
    ("form", "op_type", "number"),
    [("int8", "DequantizeLinear", 0), ("int8", "DequantizeLinear", 1), ("rounded in the file", "QuantizeLinear", 0)]
    + [("4 bits", "MatMulNBits", n) for n in range(3)],
)
def test_an_input_that_is_left_out_is_told_by_its_number(form, op_type, number):
    with pytest.raises(UsageError) as caught:
        moeopt.from_onnx(without(form, op_type, number))
    message = str(caught.value)
    if op_type == "QuantizeLinear":
        assert "the node 'experts.0.gate.w.dq'" in message and ENDING in message
    else:
        assert f"({op_type}) lacks its input number {number}: the file was damaged or edited" in message


def damage(proto, draw):
    """One change of a coded node or of a weight that it reads, and what it was."""
    node = draw.choice([n for n in proto.graph.node if n.op_type in ("DequantizeLinear", "MatMulNBits")])
    held = {t.name: t for t in proto.graph.initializer}
    kind = draw.randrange(5)
    if kind == 0:
        del node.input[draw.randrange(len(node.input)) :]
    elif kind == 1:
        node.input[draw.randrange(len(node.input))] = ""
    elif kind == 2:
        name = draw.choice(["axis", "block_size", "K", "N", "bits", "output_dtype"])
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, draw.choice([-1, 0, 3, 33, 1 << 40, "a", [1.5]]))])
    else:
        tensor = held[draw.choice([name for name in node.input if name in held])]
        a = np.zeros(tuple(tensor.dims), np.int8) if tensor.data_type > 16 else numpy_helper.to_array(tensor)
        changed = a.reshape(-1)[: draw.choice([0, 1, 5])] if kind == 3 else a.astype(draw.choice(["i4", "f2", "u1"]))
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_with_one_part_changed_is_read_or_refused_in_words(form):
    base, refused = coded_file(FORMS[form]), 0
    for seed in range(12):
        proto = onnx.ModelProto()
        proto.CopyFrom(base)
        damage(proto, random.Random(seed))
        try:
            assert isinstance(moeopt.from_onnx(proto), torch.nn.Module)
        except MoeoptError as err:
            refused += 1
            assert "please report" not in str(err) and len(str(err)) > 60
    assert refused >= 3


def clashing(form):
    """A file that has values of its own with the names that the floats of its codes would get."""
    proto = coded_file(form)
    node = first(proto, "MatMulNBits")
    made = node.output[0]
    bias = stored("bias", np.random.default_rng(1).normal(size=I).astype(np.float32))
    proto.graph.initializer.append(bias)
    node.input.extend([""] * (5 - len(node.input)) + ["bias"])
    last = next(n for n in proto.graph.node if n.output[0] == "y")
    last.input[0] = f"{made}.product"
    proto.graph.node.insert(0, helper.make_node("Mul", ["x", "half"], [f"{made}.floats"], name="half"))
    twice = helper.make_node("Add", [f"{made}.floats", f"{made}.floats"], [f"{made}.product"], name="twice")
    proto.graph.node.insert(1, twice)
    proto.graph.initializer.append(stored("half", np.array(0.5, np.float32)))
    return proto


def test_names_of_the_file_s_own_are_not_taken():
    proto = clashing(Packed(4))
    x = np.random.default_rng(2).normal(size=(5, H)).astype(np.float32)
    want = torch.from_numpy(runs(proto, x))
    assert torch.allclose(moeopt.from_onnx(proto)(torch.from_numpy(x)), want, rtol=1e-5, atol=1e-5)
    found = moeopt.optimize(proto, verify="fast")
    assert torch.allclose(found(torch.from_numpy(x)), want, rtol=1e-5, atol=1e-5)


def test_each_constant_is_made_floats_once(monkeypatch):
    from moeopt.onnx_in import coded_nodes

    made = []
    real = coded_nodes.coded
    monkeypatch.setattr(coded_nodes, "coded", lambda node, *rest: made.append(node) or real(node, *rest))
    moeopt.from_onnx(coded_file(FORMS["int8"]))
    assert len(made) == len(set(made)) == 3 * E
    made.clear()
    moeopt.optimize(coded_file(FORMS["int8"]), verify="fast")
    assert len(made) == len(set(made)) == 3 * E
