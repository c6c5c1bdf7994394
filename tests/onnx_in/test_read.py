"""What strangers' files may not hold, each refused with the file, the place and the way out."""

import os
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import moeopt
from moeopt.errors import UsageError
from moeopt.onnx_in.read import is_onnx, read_onnx
from moeopt.onnx_in.tensors import tensor_of


def model(nodes=None, weights=(), inputs=("x",), outputs=("y",), opset=17, domains=(), dims=("t", 4), **graph):
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")] if nodes is None else nodes
    ends = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(dims)) for n in names] for names in (inputs, outputs)
    ]
    made = helper.make_graph(nodes, "g", *ends, initializer=list(weights), **graph)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(made, opset_imports=opsets, ir_version=9)


def weight(name="w", dims=(4, 4), **external):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
    if external:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            tensor.external_data.add(key=key, value=str(value))
    else:
        tensor.raw_data = b"\0" * 64
    return tensor


def product(**external):
    return model([helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [weight(**external)])


def node(op, reads, makes, name="n", **more):
    return helper.make_node(op, reads, makes, name=name, **more)


def sparse_tensor():
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    return helper.make_sparse_tensor(values, helper.make_tensor("at", TensorProto.INT64, [1], [3]), [16])


def of_version(number):
    made = model()
    made.ir_version = number
    return made


def text_input():
    made = model([node("Identity", ["x"], ["y"])])
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = TensorProto.STRING
    return made


def sparse():
    made = model()
    made.graph.sparse_initializer.append(sparse_tensor())
    return made


def in_branches(name):
    """A node that calls the function ``name`` in either branch."""
    ways = {}
    for way in ("then", "else"):
        end = helper.make_tensor_value_info(way, TensorProto.FLOAT, ["t", 4])
        ways[f"{way}_branch"] = helper.make_graph([node(name, ["a"], [way], domain="own")], way, [], [end])
    return node("If", ["c"], ["b"], **ways)


def branching(count, last):
    """Functions F0, F1, ... that call the one before them in two branches, and F0 the function ``last``."""
    made = called(f"F{count}", leaf=[])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    yes = node("Constant", [], ["c"], value=helper.make_tensor("yes", TensorProto.BOOL, (), [True]))
    for n in range(count + 1):
        calls = in_branches(f"F{n - 1}" if n else last)
        made.functions.append(helper.make_function("own", f"F{n}", ["a"], ["b"], [yes, calls], opsets))
    return made


def called(first, **bodies):
    """A model of one function, with what each function calls, one after the other."""
    made = model([node(first, ["x"], ["y"], domain="own")], domains=["own"])
    for name, calls in bodies.items():
        chain = ["a", *(f"t{n}" for n in range(len(calls)))]
        nodes = [node(c, [r], [m], domain="own") for c, r, m in zip(calls, chain, chain[1:], strict=False)]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        nodes.append(node("Add", [chain[-1], "a"], ["b"]))
        made.functions.append(helper.make_function("own", name, ["a"], ["b"], nodes, opsets))
    return made


HOSTILE = {
    "parent": (lambda: product(location="../secret.bin", length=64), "outside of the model's folder"),
    "absolute": (lambda: product(location="/etc/passwd", length=64), "outside of the model's folder"),
    "no file": (lambda: product(location="gone.bin", length=64), "lies in 'gone.bin', which is not there"),
    "link": (lambda: product(location="link.bin", length=64), "outside of the model's folder"),
    "beyond": (lambda: product(location="data.bin", offset=32), "ends at byte 96, and data.bin has 64"),
    "offset": (lambda: product(location="data.bin", offset="-8"), "does not say where it begins and ends"),
    "length": (lambda: product(location="data.bin", length=60), "has 60 bytes, and its shape says 64"),
    "huge": (
        lambda: product(dims=(1 << 40, 1 << 40), location="data.bin"),
        "has the shape [1099511627776, 1099511627776]",
    ),
    "negative": (lambda: product(dims=(-4, 4), location="data.bin"), "has the shape [-4, 4]"),
    "short": (lambda: model(weights=[weight(dims=(8, 8))]), "has 64 bytes, and its shape says 256"),
    "cycle": (
        lambda: model(
            [node("Add", ["x", "b"], ["a"], "first"), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])]
        ),
        "the node 'first' in the graph 'g' reads 'b', which no node before it makes: the graph holds a cycle",
    ),
    "twice": (
        lambda: model([node("Relu", ["x"], ["y"]), node("Abs", ["x"], ["y"], "again")]),
        "made twice, the second time by",
    ),
    "weights": (lambda: model(weights=[weight(), weight()]), "'w' names two values"),
    "output": (lambda: model(outputs=("z",)), "nothing makes the output 'z'"),
    "old": (
        lambda: model(opset=9),
        "it is of opset 9, and moeopt reads 13 and newer: convert it with onnx.version_converter",
    ),
    "no opset": (
        lambda: helper.make_model(model().graph, opset_imports=[helper.make_opsetid("other", 1)], ir_version=9),
        "it does not say of which opset its operators are: add opset_import",
    ),
    "sparse": (lambda: sparse(), "'w' holds a sparse tensor, and moeopt reads whole ones"),
    "sparse constant": (
        lambda: model([node("Constant", [], ["s"], "held", sparse_value=sparse_tensor()), node("Relu", ["x"], ["y"])]),
        "'held' holds a sparse tensor",
    ),
    "given twice": (lambda: model(outputs=("y", "y")), "the graph gives 'y' twice, and a result is told by its name"),
    "text": (lambda: text_input(), "'x' holds STRING, an element type that torch lacks"),
    "newer": (
        lambda: of_version(99),
        "does not load it: [ONNXRuntimeError] : 1 : FAIL : Unsupported model IR version: 99",
    ),
    "empty": (onnx.ModelProto, "it is not an ONNX graph"),
    "no name": (lambda: product(location="da\0ta.bin", length=64), "which names no file"),
    "long name": (lambda: product(location="a" * 5000, length=64), "which names no file"),
    "wide input": (lambda: model(dims=(1 << 40, 1 << 20)), "and no tensor of more than 1073741824 elements is run"),
    "negative input": (lambda: model(dims=(-3, 4)), "'x' has the shape ['-3', '4']"),
    "itself": (lambda: called("F", F=["F"]), "the function 'F' calls itself"),
    "each other": (lambda: called("F", F=["G"], G=["F"]), "calls itself: it was damaged, or made to hang who reads it"),
    "doubling": (
        lambda: called("F60", F0=[], **{f"F{n}": [f"F{n - 1}"] * 2 for n in range(1, 61)}),
        "its functions are over 2^40 nodes when they are written out, and moeopt reads 262144",
    ),
    "doubling a few times": (
        lambda: called("F15", F0=[], **{f"F{n}": [f"F{n - 1}"] * 2 for n in range(1, 16)}),
        "its functions are 65535 nodes when they are written out, and moeopt reads 24064 of a file that holds 47: "
        "export the model without functions of functions",
    ),
    "itself in a branch": (lambda: branching(0, "F0"), "the function 'F0' calls itself"),
    "each other in branches": (lambda: branching(3, "F3"), "calls itself: it was damaged, or made to hang who reads"),
    "doubling in branches": (
        lambda: branching(50, "leaf"),
        "its functions are over 2^40 nodes when they are written out, and moeopt reads 262144",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_file_is_refused(name, tmp_path):
    make, said = HOSTILE[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "data.bin").write_bytes(b"\0" * 64)
    (tmp_path / "secret.bin").write_bytes(b"\0" * 64)
    os.symlink(tmp_path / "secret.bin", folder / "link.bin")
    (folder / "m.onnx").write_bytes(make().SerializeToString())
    with pytest.raises(UsageError) as caught:
        moeopt.optimize(folder / "m.onnx")
    assert said in str(caught.value) and str(folder / "m.onnx") in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "domains"),
    [
        ([node("Evil", ["x"], ["y"], domain="custom.ops")], ["custom.ops"]),
        ([node("NoSuchOperator", ["x"], ["y"])], []),
        ([node("PythonOp", ["x"], ["y"], domain="com.microsoft")], ["com.microsoft"]),
    ],
)
def test_operators_that_onnx_runtime_does_not_know_are_told(nodes, domains, tmp_path):
    (tmp_path / "m.onnx").write_bytes(model(nodes, domains=domains).SerializeToString())
    with pytest.raises(UsageError, match=r"m\.onnx: ONNX Runtime \S+ does not load it"):
        moeopt.optimize(tmp_path / "m.onnx")


def test_what_is_no_file_is_told(tmp_path):
    (tmp_path / "text.onnx").write_text("not a graph")
    (tmp_path / "folder.onnx").mkdir()
    for name, said in (
        ("gone.onnx", "there is no such file"),
        ("text.onnx", "it is not an ONNX graph"),
        ("folder.onnx", "is a directory: give the .onnx file in it"),
    ):
        with pytest.raises(UsageError, match=said):
            moeopt.optimize(tmp_path / name)


def test_a_value_with_weights_elsewhere_is_refused():
    with pytest.raises(UsageError, match="a ModelProto does not say where that is: give the path"):
        read_onnx(product(location="data.bin", length=64))


def test_data_that_have_two_names_on_the_disk_are_mapped(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"\0\0\x80?" * 16)
    os.link(tmp_path / "data.bin", tmp_path / "other.bin")
    (tmp_path / "m.onnx").write_bytes(product(location="data.bin", length=64).SerializeToString())
    held = read_onnx(tmp_path / "m.onnx").model.graph.initializers["w"].const_value
    assert torch.equal(tensor_of(held, "w"), torch.ones(4, 4))


def names_of(nodes):
    return [n.name for n in nodes]


def test_nodes_that_stand_before_what_they_read_are_put_in_order_on_a_copy():
    """The others keep the order that they have; bodies and functions too."""
    late = [
        node("Add", ["b", "c"], ["y"], "last"),
        node("Relu", ["a"], ["b"], "middle"),
        node("Abs", ["a"], ["c"], "other"),
    ]
    made = model([*late, node("Neg", ["x"], ["a"], "first")])
    before = made.SerializeToString()
    assert names_of(read_onnx(made).proto.graph.node) == ["first", "middle", "other", "last"]
    assert made.SerializeToString() == before
    body = helper.make_graph(
        [node("Relu", ["t"], ["r"], "second"), node("Neg", ["a"], ["t"], "one")], "body",
        [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )  # fmt: skip
    branch = helper.make_node("If", ["flag"], ["y"], "branch", then_branch=body, else_branch=body)
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    found = read_onnx(model([branch, node("Abs", ["x"], ["a"], "abs")], weights=[flag])).proto.graph.node
    assert names_of(found) == ["abs", "branch"]
    assert [names_of(a.g.node) for a in found[1].attribute] == [["one", "second"]] * 2
    plain = model()
    assert read_onnx(plain).proto is plain


def test_functions_are_inlined_on_a_copy(tmp_path):
    body = helper.make_function(
        "own", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    made = model([node("Twice", ["x"], ["y"], domain="own")], domains=["own"])
    made.functions.append(body)
    before = made.SerializeToString()
    assert [n.op_type for n in read_onnx(made).proto.graph.node] == ["Add"]
    assert made.SerializeToString() == before


def test_functions_that_call_each_other_many_times_are_counted_once_each():
    from moeopt.onnx_in.functions import DEEPEST, check_functions

    wide = {"f0": [f"g{n}" for n in range(2000)]} | {f"g{n}": ["last"] for n in range(2000)} | {"last": []}
    seen = []

    class Counted(list):
        def __iter__(self):
            seen.append(self)
            return super().__iter__()

    check_functions("f", Functions(called("f0", **wide), Counted))
    assert len(seen) == len(wide)
    deep = {f"f{n}": [f"f{n + 1}"] for n in range(5000)} | {"f5000": []}
    with pytest.raises(UsageError, match=f"call each other 5001 deep, and moeopt reads {DEEPEST}: export the model"):
        read_onnx(called("f0", **deep))
    read_onnx(called("f0", **({f"f{n}": [f"f{n + 1}"] for n in range(DEEPEST - 1)} | {f"f{DEEPEST - 1}": []})))


class Functions:
    """A model whose functions hold their nodes in lists of a kind."""

    def __init__(self, proto, kind):
        self.graph = proto.graph
        self.functions = [SimpleNamespace(domain=f.domain, name=f.name, node=kind(f.node)) for f in proto.functions]


def test_only_onnx_models_are_taken_for_such():
    assert is_onnx("a/b.onnx") and is_onnx(onnx.ModelProto())
    assert not is_onnx("a/b.pt") and not is_onnx(3) and not is_onnx(None)
