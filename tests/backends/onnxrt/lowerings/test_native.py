"""moeopt's own operator in ONNX Runtime: the reference's numbers on the weights that each other lowering stores."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from moeopt.backends.onnxrt.custom_op import register
from moeopt.backends.onnxrt.lowerings import LOWERINGS, by_name
from moeopt.backends.onnxrt.lowerings.native import STORAGES, Native
from moeopt.backends.onnxrt.session import Session
from moeopt.ir.specs import RouterSpec
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact, make_site, model_of, tokens
from tests.backends.onnxrt.lowerings.test_lowerings import BUDGET, random_spec
from tests.backends.onnxrt.native import needs_operator

ROUTER = RouterSpec("softmax_topk", 2, 5)
NAMES = ("x", "ids", "weights")


@pytest.fixture(autouse=True)
def operator():
    needs_operator()


def session_of(model, threads=1):
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    return Session(proto.SerializeToString(), threads=threads, prepare=register)


def run(session, *args):
    return session.run(dict(zip(NAMES, args, strict=True)))[0]


def test_every_lowering_says_how_it_stores_weights():
    assert set(STORAGES) == {lowering.name for lowering in LOWERINGS}


@pytest.mark.parametrize("base", STORAGES)
def test_random_specs_agree_with_the_reference(base):
    native, carried = Native(by_name(base)), 0
    for seed in range(40):
        site = make_site(seed=seed, router=ROUTER, **random_spec(seed) | {"accum_dtype": None})
        if native.refuses(site, "cpu"):
            continue
        carried += 1
        session = session_of(model_of(site, native), threads=1 + seed % 2)
        for T in (0, 1, 64):
            args = tokens(site, T, seed=seed, beyond=0.15, negative=0.15)
            got, want = run(session, *args), exact(site, *args)
            assert got.shape == want.shape
            assert eps_off(got, want) <= BUDGET, (seed, T, str(site.spec))
    assert carried >= {"unrolled": 40, "moe-masked-log": 3}.get(base, 8)


@pytest.mark.parametrize("base", ["unrolled", "dense"])
def test_it_writes_the_weights_of_the_other_lowering_and_no_others(base):
    site = make_site()
    with_node, plain = (model_of(site, low).graph.initializers for low in (Native(by_name(base)), by_name(base)))
    assert with_node and set(with_node) < set(plain)
    for name, value in with_node.items():
        np.testing.assert_array_equal(value.const_value.numpy(), plain[name].const_value.numpy())


def test_a_token_s_bits_depend_on_no_other_token():
    site = make_site(E=3, H=70, I=150)
    session = session_of(model_of(site, Native(by_name("unrolled"))))
    x, ids, w = tokens(site, 40)
    whole = run(session, x, ids, w)
    for some in (slice(0, 1), slice(3, 5), slice(7, 10), slice(20, 36)):
        assert torch.equal(run(session, x[some], ids[some], w[some]), whole[some])


def test_tokens_of_one_expert_and_of_none():
    site = make_site(E=6)
    session = session_of(model_of(site, Native(by_name("unrolled"))))
    x, ids, w = tokens(site, 7)
    same = torch.full_like(ids, 5)
    assert eps_off(run(session, x, same, w), exact(site, x, same, w)) <= BUDGET
    for nobody in (-1, 6, 1 << 40, -(1 << 40)):
        assert not run(session, x, torch.full_like(ids, nobody), w).any()


def test_nan_and_infinity_stay_in_their_rows():
    site = make_site(E=4, K=2)
    session = session_of(model_of(site, Native(by_name("unrolled"))))
    x, ids, w = tokens(site, 9)
    clean = run(session, x, ids, w)
    x[2], x[5, 1] = float("nan"), float("inf")
    got = run(session, x, ids, w)
    rows = [t for t in range(9) if t not in (2, 5)]
    assert torch.equal(got[rows], clean[rows]) and not torch.isfinite(got[[2, 5]]).all(-1).any()


@pytest.mark.parametrize(
    ("changes", "provider", "words"),
    [
        ({}, "cuda", "runs on a CPU, not on cuda"),
        ({"dtype": torch.float64}, "cpu", "in float32, and here is float64"),
        ({"accum_dtype": "float64"}, "cpu", "in float32, and here is float64"),
        ({"out_of_range": "identity", "D": 8}, "cpu", "12 is not the output's width 8"),
    ],
)
def test_what_it_refuses(changes, provider, words):
    assert words in Native(by_name("unrolled")).refuses(make_site(**changes), provider)


def edited(change, base="unrolled"):
    proto = ir.to_proto(model_of(make_site(I=5), Native(by_name(base))))
    change(proto, next(n for n in proto.graph.node if n.domain == "moeopt"))
    return proto


def attribute(name, value):
    def change(proto, node):
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, *([] if value is None else [onnx.helper.make_attribute(name, value)])])

    return change


def reshaped(number, *dims):
    def change(proto, node):
        tensor = next(t for t in proto.graph.initializer if t.name == node.input[number])
        array = np.zeros(dims, "f4")
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    return change


def computed(proto, node):
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", [node.input[3]], ["made"]))
    node.input[3] = "made"
    size = onnx.helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1])
    proto.graph.input.append(size)
    proto.graph.node[0].CopyFrom(onnx.helper.make_node("ConstantOfShape", ["size"], ["made"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (attribute("experts", 4), "more or fewer constants"),
        (attribute("experts", 0), "more or fewer constants"),
        (attribute("experts", 1 << 62), "more or fewer constants"),
        (attribute("experts", None), "more or fewer constants"),
        (attribute("norm", 1), "more or fewer constants"),
        (attribute("stacked", 1), "more or fewer constants"),
        (attribute("rows", "separate"), "gate and up in weights of their own"),
        (attribute("rows", "other"), "the attribute rows is missing, or says"),
        (attribute("rows", None), "the attribute rows is missing, or says"),
        (attribute("rows", "g" * 100), "the attribute rows is missing, or says"),
        (attribute("rows", "plain"), "sizes of its weights do not fit"),
        (attribute("activation", 7), "the attribute activation is missing, or says"),
        (attribute("w_in", "oi"), "sizes of its weights do not fit"),
        (reshaped(3, 12, 12), "sizes of its weights do not fit"),
        (reshaped(3, 12), "another rank or number of experts"),
        (reshaped(3, 0, 12), "sizes of its weights do not fit"),
        (reshaped(3, 1, 1, 1, 1, 12), "another rank or element type"),
        (reshaped(13, 4, 10), "a table of biases or norms does not fit"),
        (reshaped(13, 6, 9), "a table of biases or norms does not fit"),
        (reshaped(13, 6, 0, 10), "a table of biases or norms does not fit"),
        (computed, "is none of its constants"),
    ],
)
def test_a_node_that_is_wrong_is_refused_when_the_session_is_made(change, words):
    with pytest.raises(Exception, match=words):
        session_of(edited(change))


@pytest.mark.parametrize(
    "sizes",
    [((3, 12), (4, 2), (4, 2)), ((4, 12), (4, 2), (4, 3)), ((4, 11), (4, 2), (4, 2)), ((4, 12), (4, 0), (4, 0))],
)
def test_a_call_that_is_wrong_is_refused(sizes):
    proto = edited(lambda proto, node: None)
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = f"{value.name}{len(dim.dim_param)}" if not dim.dim_value else ""
            dim.ClearField("dim_value")
    session = session_of(proto)
    x, ids, w = (torch.zeros(size, dtype=torch.int64 if n == 1 else torch.float32) for n, size in enumerate(sizes))
    with pytest.raises(Exception, match="x, ids and weights do not fit one another"):
        run(session, x, ids, w)
