"""Float32 products as sums: the same numbers in ONNX Runtime, in subgraphs too, and what is left alone."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx_ir as ir

from moeopt.backends.tensorrt.graph_check import check_graph
from moeopt.backends.tensorrt.lowerings import by_name
from moeopt.backends.tensorrt.sums import matmuls_as_sums, sums_for
from moeopt.backends.tensorrt.target import parse_target
from moeopt.lower.onnx.assemble import one_op
from tests.backends.onnxrt.lowerings.one_site import make_site


def outputs(model, feeds):
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def same(model, feeds, count):
    want = outputs(model, feeds)
    assert matmuls_as_sums(model) == count
    for got, before in zip(outputs(model, feeds), want, strict=True):
        np.testing.assert_allclose(got, before, rtol=2e-5, atol=2e-6)  # sums of at most 32 terms in another order
    assert check_graph(model, parse_target("sm_75")) == []


def graph(text):
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]>\n{text}')


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_products_of_any_rank():
    model = graph("""g (float[T,8] x, float[B,1,8,4] w) => (float[B,1,T,4] y, float[T,4] z) {
        y = MatMul(x, w)
        c = Constant<value = float[2] {1.0, -2.0}>()
        a = Constant<value_ints = [0, 1]>()
        z = Squeeze(y, a)
    }""")
    same(model, {"x": noise(5, 8), "w": noise(1, 1, 8, 4, seed=1)}, 1)
    assert model.graph.outputs[0].name == "y" and [n.op_type for n in model.graph].count("ReduceSum") == 1


@pytest.mark.parametrize("given", ["", "<transA = 1, transB = 1, alpha = 0.5, beta = 2.0>"])
def test_gemm(given):
    turned = bool(given)
    shapes = ("[8,T]", "[4,8]") if turned else ("[T,8]", "[8,4]")
    text = f"g (float{shapes[0]} a, float{shapes[1]} b, float[4] c) => (float[T,4] y) {{ y = Gemm{given}(a, b, c) }}"
    a, b = noise(5, 8), noise(8, 4, seed=1)
    feeds = {"a": a.T.copy() if turned else a, "b": b.T.copy() if turned else b, "c": noise(4, seed=2)}
    same(graph(text), feeds, 1)


@pytest.mark.parametrize("form", ["loop", "dense"])
def test_a_form_of_the_experts(form):
    site = make_site(E=4, H=16, I=32, K=2)
    feeds = {"x": noise(6, 16), "ids": np.tile(np.array([[0, 3]]), (6, 1)), "weights": np.abs(noise(6, 2))}
    same(one_op(site, by_name(form)), feeds, 2)


def test_what_stays():
    half = graph("g (float16[T,8] x, float16[8,4] w) => (float16[T,4] y) { y = MatMul(x, w) }")
    vector = graph("g (float[T,8] x, float[8] w) => (float[T] y) { y = MatMul(x, w) }")
    einsum = graph('g (float[T,8] x, float[8,4] w) => (float[T,4] y) { y = Einsum<equation="th,ho->to">(x, w) }')
    assert [matmuls_as_sums(model) for model in (half, vector, einsum)] == [0, 0, 0]
    for model in (vector, einsum):
        (problem,) = check_graph(model, parse_target("sm_75"))
        assert "sm_75 does not take matmuls in float32" in problem
    assert sums_for(parse_target("sm_75")) and not sums_for(parse_target("sm_80"))


def test_the_real_builder_takes_them(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from moeopt.backends.tensorrt.build import Job, build_plan

    model = one_op(make_site(E=4, H=16, I=32, K=2), by_name("dense"))
    matmuls_as_sums(model)
    ir.save(model, tmp_path / "model.onnx")
    profile = {end.name: [(T, end.shape[1]) for T in (1, 8, 64)] for end in model.graph.inputs}
    built = build_plan(Job(tmp_path / "model.onnx", tmp_path / "engine.plan", parse_target("sm_75"), [profile]))
    assert "gemm" not in {layer.type for layer in built.layers} and built.activation_bytes < 64 * 4 * 16 * 32 * 4
    assert built.outputs[0]["dtype"] == "FLOAT"
