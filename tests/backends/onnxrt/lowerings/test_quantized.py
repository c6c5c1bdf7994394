"""Quantised experts in a graph: the numbers of the dequantised weights, codes in the file, and each refusal."""

import dataclasses

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from moeopt.backends.onnxrt.lowerings import LOWERINGS, MAPPED_LOWERINGS, NOT_PORTABLE, QUANTIZED_LOWERINGS, by_name
from moeopt.backends.onnxrt.select import ranked
from moeopt.ir.weight_format import FORMATS, INT4_BLOCK16, INT4_BLOCK32, INT8_BLOCK16, INT8_CHANNEL, WeightFormat
from moeopt.lower.onnx.pad_experts import bank_of
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact, make_site, model_of, run, session_of, tokens

BUDGET = 16  # as of the unrolled lowering, whose sums these are

SIZES = [dict(H=80, I=37), dict(H=64, I=32)]  # odd, and no multiple of a block; whole blocks
SPECS = [
    {},
    dict(rows="up|gate", w_in_layout="io", w_out_layout="io"),
    dict(rows="interleaved", activation="gelu"),
    dict(rows="separate", bias=False),
    dict(rows="plain", activation="relu2", weight_on="input"),
]


def quantized(site, format):
    """``site`` with its experts in ``format``."""
    spec, bank = site.spec, site.bank
    E = range(bank.num_experts)
    ins = [[w if spec.w_in_layout == "oi" else w.t() for w in bank.w_in(e)] for e in E]
    outs = [bank.w_out(e) if spec.w_out_layout == "oi" else bank.w_out(e).t() for e in E]
    w_in = [QuantizedMatrices.of([quantize(one[i], format) for one in ins]) for i in range(len(ins[0]))]
    b_in = [[bank.b_in(e)[i] for e in E] for i in range(len(ins[0]))]
    codes = QuantizedExpertWeights(
        w_in, QuantizedMatrices.of([quantize(w, format) for w in outs]), b_in, [bank.b_out(e) for e in E]
    )
    return dataclasses.replace(site, bank=bank_of(codes, spec))


@pytest.mark.parametrize("size", SIZES, ids=["odd", "whole"])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-block16", "int4-asymmetric32", "fp8", "mxfp4", "nf4"])
def test_agrees_with_the_dequantised_weights(name, size):
    site = quantized(make_site(**size), FORMATS[name])
    for lowering in QUANTIZED_LOWERINGS:
        if lowering.refuses(site, "cpu"):
            continue
        session = session_of(model_of(site, lowering, opset=20))
        for T in (0, 1, 33):
            args = tokens(site, T, beyond=0.2, negative=0.2)
            assert eps_off(run(session, *args), exact(site, *args)) <= BUDGET, lowering.name


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("lowering", QUANTIZED_LOWERINGS, ids=lambda low: low.name)
def test_agrees_for_each_layout(lowering, spec):
    site = quantized(make_site(H=48, I=40, **spec), INT4_BLOCK16)
    assert lowering.refuses(site, "cpu") == ""
    args = tokens(site, 21)
    assert eps_off(run(session_of(model_of(site, lowering, opset=20)), *args), exact(site, *args)) <= BUDGET


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "mxfp4"])
def test_the_file_has_the_bits_of_the_format(name, tmp_path):
    site = quantized(make_site(E=4, H=512, I=384, bias=False), FORMATS[name])
    (choice, *_) = [c for c in ranked(site, "cpu") if c.lowering is not None]
    ir.save(model_of(site, choice.lowering), tmp_path / "m.onnx", external_data="m.data")
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size == pytest.approx(site.bank.format.nbytes(), rel=0.05)


def test_four_bits_stay_codes_and_other_formats_become_floats():
    int4 = [c.name for c in ranked(quantized(make_site(), INT4_BLOCK32), "cpu") if c.lowering is not None]
    assert int4 == ["unrolled-codes", "unrolled-floats"]
    for name in ("int8", "fp8", "mxfp4"):
        choices = ranked(quantized(make_site(), FORMATS[name]), "cpu")
        assert [c.name for c in choices if c.lowering is not None] == ["unrolled-floats"]
        assert "MatMulNBits is quick with float32 activations for 4-bit integers only" in choices[1].reason


BYTES = {
    **{name: FORMATS[name] for name in ("int8", "int8-block16", "int8-block32", "int8-block128")},
    "uint8": WeightFormat("uint8", "uint8", (1, 16)),
    "uint8, zero points": WeightFormat("uint8, zero points", "uint8", (1, 16), symmetric=False),
    "int8, zero points": WeightFormat("int8, zero points", "int8", (1, None), symmetric=False),
}


@pytest.mark.parametrize("size", [*SIZES, dict(H=300, I=130)], ids=["odd", "whole", "wide"])
@pytest.mark.parametrize("name", BYTES)
def test_eight_bits_as_codes_agree_with_the_dequantised_weights(name, size):
    site = quantized(make_site(**size), BYTES[name])
    session = session_of(model_of(site, "unrolled-bytes", opset=20))
    for T in (0, 1, 33):
        args = tokens(site, T, beyond=0.2, negative=0.2)
        assert eps_off(run(session, *args), exact(site, *args)) <= BUDGET


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_points_of_four_bits_agree_for_each_layout(spec):
    site = quantized(make_site(H=48, I=40, **spec), WeightFormat("own", "uint4", (1, 16), symmetric=False))
    assert by_name("unrolled-codes").refuses(site, "cpu") == ""
    args = tokens(site, 21)
    assert eps_off(run(session_of(model_of(site, "unrolled-codes", opset=20)), *args), exact(site, *args)) <= BUDGET


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("format", [INT8_CHANNEL, INT8_BLOCK16, BYTES["int8, zero points"]], ids=str)
def test_eight_bits_as_codes_agree_for_each_layout(format, spec):
    site = quantized(make_site(H=48, I=40, **spec), format)
    args = tokens(site, 21)
    assert eps_off(run(session_of(model_of(site, "unrolled-bytes", opset=20)), *args), exact(site, *args)) <= BUDGET


@pytest.mark.parametrize(("name", "form"), [("int8", "unrolled-bytes"), ("int4", "unrolled-codes")])
def test_mapped_takes_the_form_whose_codes_stay_in_the_file(name, form, tmp_path):
    site = quantized(make_site(E=4, H=512, I=384, bias=False), FORMATS[name])
    best = ranked(site, "cpu", mapped=True)[0]
    assert best.name == form
    model = model_of(site, best.lowering)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size == pytest.approx(site.bank.format.nbytes(), rel=0.05)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    held = sum(len(t.raw_data) for t in onnx.load(tmp_path / "loaded.onnx").graph.initializer)
    floats = 4 * 4 * 3 * 512 * 384
    assert 0 < held < 0.3 * floats, "the session made floats of the codes"


def test_mapped_falls_back_to_floats_and_says_why():
    choices = ranked(quantized(make_site(), FORMATS["fp8"]), "cpu", mapped=True)
    assert [c.name for c in choices if c.lowering is not None] == ["unrolled-floats"]
    assert any("it is for 8-bit integers, not for fp8" in c.reason for c in choices)
    tiles = quantized(make_site(), WeightFormat("tiles", "int8", (128, 128)))
    why = by_name("unrolled-bytes").refuses(tiles, "cpu")
    assert why.startswith("MatMulNBits takes blocks of 16, 32, 64, 128 or 256 inputs of one output, not tiles")
    assert ranked(make_site(), "cpu", mapped=True)[0].lowering in LOWERINGS


def test_a_portable_engine_has_no_product_of_codes():
    for low in MAPPED_LOWERINGS:
        assert low.name in NOT_PORTABLE
    choices = ranked(quantized(make_site(), INT4_BLOCK32), "cpu", without=NOT_PORTABLE, mapped=True)
    assert [c.name for c in choices if c.lowering is not None] == ["unrolled-floats"]
    assert "portable=True: its operator is of ONNX Runtime's own" in {c.reason for c in choices}


def test_a_node_for_each_expert_and_matrix():
    nodes = list(model_of(quantized(make_site(E=6), INT4_BLOCK32), "unrolled-codes").graph)
    ours = [n for n in nodes if n.op_type == "MatMulNBits"]
    assert len(ours) == 12 and {n.attributes["accuracy_level"].as_int() for n in ours} == {1}
    assert not any(n.op_type == "MatMul" for n in nodes)


@pytest.mark.parametrize(
    ("make", "provider", "words"),
    [
        (lambda: make_site(), "cpu", "its experts are floats"),
        (lambda: quantized(make_site(), FORMATS["int8"]), "cpu", "MatMulNBits is quick with float32"),
        (lambda: quantized(make_site(), FORMATS["int4-channel"]), "cpu", "MatMulNBits takes blocks of 16, 32, 64"),
        (lambda: quantized(make_site(), INT4_BLOCK32), "cuda", "MatMulNBits was not run on cuda"),
        (
            lambda: quantized(make_site(dtype=torch.float64), INT4_BLOCK32), "cpu",
            "MatMulNBits computes in float32 here, and the experts in torch.float64",
        ),
    ],
)  # fmt: skip
def test_refusals(make, provider, words):
    assert by_name("unrolled-codes").refuses(make(), provider).startswith(words)


def test_forms_of_floats_and_of_codes_do_not_mix():
    assert by_name("unrolled-floats").refuses(make_site(), "cpu") == "its experts are floats"
    names = {c.name for c in ranked(quantized(make_site(), INT4_BLOCK32), "cpu")}
    assert names == {low.name for low in QUANTIZED_LOWERINGS} and not names & {low.name for low in LOWERINGS}
