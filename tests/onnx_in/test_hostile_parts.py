"""Parts of strangers' files that are looked at wherever they stand: tensors of functions, listed numbers, loops."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import moeopt
from moeopt.errors import UsageError
from moeopt.onnx_in.endless import MOST_ROUNDS
from moeopt.onnx_in.read import read_onnx
from tests.onnx_in.bodies import LOOP
from tests.onnx_in.bodies import model as with_body
from tests.onnx_in.test_read import called, model, node, product, sparse_tensor, weight


def in_function(**held):
    """A function whose product has a constant of its own."""
    made = called("F", F=[])
    del made.functions[0].node[:]
    made.functions[0].node.extend([node("Constant", [], ["w"], "held", **held), node("MatMul", ["a", "w"], ["b"])])
    return made


def listed(kind=TensorProto.FLOAT, dims=(4, 4), **numbers):
    tensor = TensorProto(name="w", data_type=kind, dims=dims, **numbers)
    return model([node("Constant", [], ["w"], "held", value=tensor), node("Relu", ["x"], ["y"])])


def named(domain, name):
    function = helper.make_function(
        domain, name, ["a"], ["b"], [node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    made = model([node(name, ["x"], ["y"], domain=domain)], domains=[domain] if domain else [])
    made.functions.append(function)
    return made


def twice(made):
    made.functions.append(made.functions[0])
    return made


def with_more_inputs(made):
    made.graph.node[0].input.extend(["x", "x"])
    return made


def of_opsets(domain):
    made = model()
    made.opset_import.append(helper.make_opsetid(domain, 9))
    return made


HOSTILE = {
    "function outside": (
        lambda: in_function(value=weight(location="../secret.bin", length=64)),
        "the weight 'w' lies in '../secret.bin', outside of the model's folder",
    ),
    "function huge": (
        lambda: in_function(value=TensorProto(name="w", data_type=1, dims=[1 << 39])),
        "has 0 numbers of the element type FLOAT, and its shape says 549755813888",
    ),
    "function sparse": (lambda: in_function(sparse_value=sparse_tensor()), "'held' holds a sparse tensor"),
    "function twice": (
        lambda: twice(called("F", F=[])),
        "there are two of the function 'F' of the domain 'own': it was damaged or edited",
    ),
    "function of more inputs": (
        lambda: with_more_inputs(called("F", F=[])),
        "cannot exceed number of formal parameters): it was damaged, or export the model without functions",
    ),
    "an operator's name": (
        lambda: named("", "Relu"),
        "the function 'Relu' of the domain '' stands among operators, and ONNX Runtime takes an operator of that name",
    ),
    "a contrib operator's name": (
        lambda: named("com.microsoft", "Gelu"),
        "stands among operators, and ONNX Runtime takes an operator of that name instead: give the function a domain "
        "of its own",
    ),
    "fewer numbers": (lambda: listed(float_data=[1.0] * 7), "has 7 numbers of the element type FLOAT, and its shape"),
    "more numbers": (lambda: listed(float_data=[1.0] * 17), "has 17 numbers of the element type FLOAT, and its shape"),
    "another field": (lambda: listed(int64_data=[1] * 16), "has 0 numbers of the element type FLOAT, and its shape"),
    "half of a complex": (
        lambda: listed(TensorProto.COMPLEX64, float_data=[1.0] * 16),
        "has 16 numbers of the element type COMPLEX64, and its shape says 32",
    ),
    "whole codes of four bits": (
        lambda: listed(TensorProto.INT4, int32_data=[1] * 16),
        "has 16 numbers of the element type INT4, and its shape says 8",
    ),
    "two opsets": (
        lambda: of_opsets(""),
        "it says of two opsets that its operators are of them (9, 17): take one of the two out of opset_import",
    ),
    "two opsets under two names": (lambda: of_opsets("ai.onnx"), "(9, 17): take one of the two out"),
    "a link to itself": (lambda: product(location="itself", length=64), "lies in 'itself', which is not there"),
    "a loop": (
        lambda: with_body(LOOP, trips=np.array(1 << 62)),
        f"the node 'loop_4' (Loop) runs its body more than {MOST_ROUNDS} times, and no condition stops it",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_where_it_is_read(name, tmp_path):
    make, said = HOSTILE[name]
    (tmp_path / "secret.bin").write_bytes(b"\0" * 64)
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink("itself", folder / "itself")
    onnx.save_model(make(), str(folder / "m.onnx"))
    with pytest.raises(UsageError) as caught:
        read_onnx(folder / "m.onnx")
    assert said in str(caught.value) and str(folder / "m.onnx") in str(caught.value)


def test_tensors_that_list_their_numbers_as_they_should_are_taken():
    kinds = {"float32": 16, "float64": 16, "int64": 16, "uint64": 16, "int8": 16, "bool": 16, "float16": 16}
    for kind in kinds:
        tensor = helper.make_tensor("w", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), (4, 4), np.ones(16, kind))
        assert not tensor.raw_data and read_onnx(model(weights=[tensor]))
    for kind in (TensorProto.INT4, TensorProto.BFLOAT16, TensorProto.COMPLEX64, TensorProto.STRING):
        values = [b"a"] * 15 if kind == TensorProto.STRING else np.ones(15)
        assert read_onnx(model(weights=[helper.make_tensor("w", kind, (3, 5), values)]))


def loop_of(trips=None, goes="go", start="yes", around=""):
    """A loop of ``trips`` rounds, whose condition is the value ``goes`` after each; in another one where ``around``."""
    loop = f"y = Loop ({'trips' if trips is not None else ''}, {start}, x) <body = b (int64 e, bool go, float[t, 8] a)"
    loop += f" => (bool again, float[t, 8] b) {{ again = Identity({goes}) b = Relu(a) }}>"
    if around:
        loop = (
            f"y = Loop ({around}, yes, x) <body = o (int64 o, bool ahead, float[t, 8] c) => (bool more, float[t, 8] d)"
        )
        loop += " { more = Identity(ahead) d = Loop (trips, yes, c) <body = b (int64 e, bool go, float[t, 8] a)"
        loop += " => (bool again, float[t, 8] b) { again = Identity(go) b = Relu(a) }> }>"
    held = {"trips": np.array(trips), "outer": np.array(1 << 13)} if trips is not None else {}
    return with_body(f"flag = Not(yes)\n{loop}", **held)


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (lambda: loop_of(MOST_ROUNDS), True),
        (lambda: loop_of(MOST_ROUNDS + 1), False),
        (lambda: loop_of(), False),
        (lambda: loop_of(MOST_ROUNDS + 1, goes="flag"), True),
        (lambda: loop_of(goes="yes"), False),
        (lambda: loop_of(MOST_ROUNDS + 1, start="flag"), True),
        (lambda: loop_of(1 << 12, around="outer"), False),
        (lambda: loop_of(1 << 11, around="outer"), True),
    ],
)
def test_loops_that_nothing_ends(make, ends):
    if ends:
        assert read_onnx(make())
    else:
        with pytest.raises(UsageError, match=r"and no condition stops it: it was damaged, or made to hang who runs it"):
            read_onnx(make())


def test_what_onnx_runtime_quotes_of_a_name_cannot_move_the_cursor():
    with pytest.raises(UsageError) as caught:
        moeopt.optimize(model([node("Evil", ["x"], ["y"], "\x1b[2Jbad")]))
    assert "does not load it" in str(caught.value) and "\x1b" not in str(caught.value)


def test_numbers_of_a_weight_are_what_they_were():
    """Listed numbers come out as raw ones."""
    held = helper.make_tensor("w", TensorProto.FLOAT, (2, 2), [1.0, 2.0, 3.0, 4.0])
    found = read_onnx(model(weights=[held])).proto.graph.initializer[0]
    assert numpy_helper.to_array(found).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_graph_of_moeopts_own_kernel_is_named():
    made = model([node("Experts", ["x"], ["y"], domain="moeopt")], domains=["moeopt"])
    with pytest.raises(UsageError, match=r"run in moeopt's own kernel already; give model\.onnx, which is beside it"):
        moeopt.optimize(made)
