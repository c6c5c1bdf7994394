"""moeopt's own operator on quantised experts: the dequantised weights' numbers, on codes that a plain graph stores."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.budget import cost_of
from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.lowerings.native import CODED, Native
from moeopt.backends.onnxrt.session import NATIVE, Session
from moeopt.ir.weight_format import FORMATS, INT4_BLOCK32, INT8_CHANNEL, WeightFormat
from moeopt.lower.onnx.experts_node import DOMAIN
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact, make_site, model_of, tokens
from tests.backends.onnxrt.lowerings.test_lowerings import BUDGET
from tests.backends.onnxrt.lowerings.test_native import run, session_of
from tests.backends.onnxrt.lowerings.test_quantized import SIZES, SPECS, quantized
from tests.backends.onnxrt.native import choose_native, needs_operator
from tests.backends.onnxrt.toys import call, net

READ = {
    **{
        name: FORMATS[name]
        for name in ("int8", "int8-block32", "int8-block128", "int4", "int4-block16", "int4-channel")
    },
    "float16 scales": WeightFormat("float16 scales", "uint4", (1, 16), "float16"),
}
BYTES_OF_16 = WeightFormat("bytes of 16", "int8", (1, 16))


@pytest.fixture(autouse=True)
def operator():
    needs_operator()


@pytest.mark.parametrize("size", [*SIZES, dict(H=300, I=130)], ids=["odd", "whole", "wide"])
@pytest.mark.parametrize("name", READ)
def test_it_agrees_with_the_dequantised_weights(name, size):
    site, carried = quantized(make_site(**size), READ[name]), 0
    for base in map(by_name, CODED):
        native = Native(base)
        if native.refuses(site, "cpu"):
            continue
        carried += 1
        session = session_of(model_of(site, native), threads=2)
        for T in (0, 1, 33):
            args = tokens(site, T, beyond=0.2, negative=0.2)
            assert eps_off(run(session, *args), exact(site, *args)) <= BUDGET, base.name
    assert carried


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("base", CODED)
def test_it_agrees_for_each_layout_or_refuses(base, spec, bias):
    format = BYTES_OF_16 if base == "unrolled-bytes" else FORMATS["int4-block16"]
    site = quantized(make_site(H=48, I=40, **{**spec, "bias": bias}), format)
    native = Native(by_name(base))
    apart = spec.get("rows") in ("up|gate", "interleaved") and (bias or base != "unrolled-floats")
    assert native.refuses(site, "cpu") == (
        "rows of gate and up lie in another order than their scales or biases" * apart
    )
    if not apart:
        args = tokens(site, 21)
        assert eps_off(run(session_of(model_of(site, native)), *args), exact(site, *args)) <= BUDGET


@pytest.mark.parametrize(
    ("base", "format", "reason"),
    [
        ("unrolled-bytes", INT4_BLOCK32, "unrolled-bytes does not store int4"),
        ("unrolled", INT8_CHANNEL, "does not read weights as unrolled stores them"),
        ("unrolled-floats", FORMATS["fp8"], "the native kernel does not read fp8"),
        ("unrolled-floats", FORMATS["int4-asymmetric32"], "the native kernel does not read int4-asymmetric32"),
        ("unrolled-floats", WeightFormat("tiles", "int8", (16, 16)), "the native kernel reads scales of single rows"),
        ("unrolled-codes", INT8_CHANNEL, "unrolled-codes does not store int8"),
    ],
)  # fmt: skip
def test_what_it_does_not_read_is_refused_by_name(base, format, reason):
    assert reason in Native(by_name(base)).refuses(quantized(make_site(), format), "cpu")


@pytest.mark.parametrize(("base", "format"), [("unrolled-codes", INT4_BLOCK32), ("unrolled-floats", INT8_CHANNEL)])
def test_it_reads_what_the_plain_graph_stores_and_nothing_else(base, format):
    site = quantized(make_site(), format)
    with_node, plain = (
        model_of(site, low, opset=20).graph.initializers for low in (Native(by_name(base)), by_name(base))
    )
    assert with_node and set(with_node) <= set(plain)
    for name, value in with_node.items():
        np.testing.assert_array_equal(value.const_value.numpy(), plain[name].const_value.numpy())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (dict(hidden=1 << 20), "codes and scales do not fit one another"),
        (dict(hidden=1 << 50), "its attributes say nothing that codes can be"),
        (dict(block=48), "codes and scales do not fit one another"),
        (dict(block=-32), "its attributes say nothing that codes can be"),
        (dict(codes=8), "codes and scales do not fit one another"),
        (dict(codes=5), "its attributes say nothing that codes can be"),
        (dict(inner=63), "the sizes of its weights do not fit one another"),
        (dict(experts=4), "more or fewer constants than its attributes say"),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_node_is_refused_before_it_reads(edit, words):
    proto = ir.to_proto(model_of(quantized(make_site(H=128, I=64), INT4_BLOCK32), Native(by_name("unrolled-codes"))))
    (node,) = [node for node in proto.graph.node if node.domain == DOMAIN]
    for attribute in node.attribute:
        if attribute.name in edit:
            attribute.i = edit[attribute.name]
    with pytest.raises(Exception, match=f"moeopt::Experts: .*{words}"):
        session_of(onnx.ModelProto.FromString(proto.SerializeToString()))


@pytest.mark.parametrize("rows", ["separate", "gate|up"])
def test_what_a_call_holds_and_multiplies_is_counted(rows):
    site = quantized(make_site(H=96, I=32, D=96, rows=rows), INT4_BLOCK32)
    proto = ir.to_proto(model_of(site, Native(by_name("unrolled-codes"))))
    found = cost_of(proto, {"x": (1000, 96), "ids": (1000, 2), "weights": (1000, 2)})
    assert found.products >= 2000 * (2 * 32 * 96 + 32 * 96)
    assert 4 * 2000 * (96 + 2 * 32 + 32 + 96) <= found.bytes <= 8 * 2000 * (96 + 2 * 32 + 32 + 96)


@pytest.mark.parametrize("format", ["int4", pytest.param("int8", marks=pytest.mark.one_isa)])
def test_an_engine_runs_codes_in_the_kernel_and_its_bundle_too(format, monkeypatch, tmp_path):
    choose_native(monkeypatch)
    made = moeopt.optimize(net(), call(), backend="onnxruntime", quantize=format, verify="fast")
    assert made.certificate.passed and made.model.graph == NATIVE
    notes = "\n".join(made.report.notes)
    assert ("moeopt's native kernel computes on them as they lie there" in notes) == (format == "int8")
    assert "has no quick kernel" not in notes
    bundle = made.save(tmp_path / "b")
    nodes = [node for node in onnx.load(bundle / NATIVE, load_external_data=False).graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == {"ExpertsOnCodes"}
    engine, inputs = moeopt.load(bundle), call(3, 7)
    plain = Session(bundle / "model.onnx")
    assert engine.graph == NATIVE and moeopt.verify(bundle).passed
    (want,) = plain.run({name: torch.as_tensor(value) for name, value in inputs.items()})[:1]
    torch.testing.assert_close(engine(**inputs)["x"], want, rtol=0, atol=256 * torch.finfo(torch.float32).eps)


def test_a_token_s_bits_depend_on_no_other_token():
    site = quantized(make_site(E=3, H=70, I=150), INT4_BLOCK32)
    session = session_of(model_of(site, Native(by_name("unrolled-codes"))))
    x, ids, w = tokens(site, 40)
    whole = run(session, x, ids, w)
    for some in (slice(0, 1), slice(3, 5), slice(7, 10), slice(20, 36)):
        assert torch.equal(run(session, x[some], ids[some], w[some]), whole[some])
