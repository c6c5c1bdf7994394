"""The capability table: each refusal in words, the nearest target, and each row's source; and the rows that the
builder here can be asked about, asked again."""

import pytest
import torch

from moeopt.backends.tensorrt.capability import CAPABILITIES, MOE_TARGETS, V, capability, refuses, refuses_dtypes
from moeopt.backends.tensorrt.lowerings import FORMS, by_name
from moeopt.backends.tensorrt.target import GPU_BUILDS, RTX_BUILDS, parse_target
from moeopt.errors import EngineBuildError, UsageError
from tests.backends.onnxrt.lowerings.one_site import make_site
from tests.backends.tensorrt.built import build_site

f16, f32, bf16, f64 = torch.float16, torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    ("target", "subject", "name", "text"),
    [
        (
            "sm_75",
            "dtype",
            "BFLOAT16",
            "sm_75 does not take bfloat16: Turing has no bfloat16; the nearest target that takes it is sm_80; "
            "here: dtype=torch.float16",
        ),
        ("sm_75", "product of", "FLOAT", "sm_75 does not take matmuls in float32: TensorRT for RTX has no"),
        ("sm_80", "quantisation", "fp8", "sm_80 does not take fp8 quantisation: fp8 products begin with Ada (sm_89)"),
        ("sm_80", "quantisation", "fp8", "the nearest target that takes it is sm_89"),
        ("sm_89", "quantisation", "fp4", "begin with Blackwell; the nearest target that takes it is sm_100"),
        ("sm_121", "form", "trt-moe", "IMoELayer is for sm_100, sm_103 and sm_110; the nearest target that takes it"),
        (
            "sm_89",
            "op",
            "ScatterND(add)",
            "does not take ScatterND with a reduction: the parser scatters without",
        ),
        ("sm_89", "op", "NonZero", "does not take NonZero: it needs NVIDIA's plugin library; here: a mask with"),
        ("sm_89", "op", "TopK(more)", "does not take TopK of more than 3840 values"),
        ("sm_100", "dtype", "DOUBLE", "does not take float64: the parser reads float64 as float32 and does not say so"),
    ],
)
def test_a_refusal_says_why_and_what_works(target, subject, name, text):
    assert text in refuses(parse_target(target), subject, name)


def test_what_is_taken_or_unknown_is_not_refused():
    for sm in RTX_BUILDS + GPU_BUILDS:
        target = parse_target(sm)
        assert refuses(target, "dtype", "FLOAT16") == "" and refuses(target, "op", "MatMul") == ""
        assert all(capability(target, "form", form.name) is not None for form in FORMS)
        assert (refuses(target, "form", "trt-moe") == "") is (sm in MOE_TARGETS)
    assert refuses(parse_target("sm_120"), "quantisation", "fp4") == ""


def test_every_row_has_its_source_and_refusals_their_words():
    for row in CAPABILITIES:
        assert row.source.startswith(("built on ", "refused by ", "seen on ", "source: ")), row
        assert V in row.source or row.source.startswith("source: "), row
        assert bool(row.why) is not row.takes, row
        if row.product == "tensorrt":
            assert not row.source.startswith("built"), "TensorRT itself was never run here"
    named = [(row.product, row.subject, row.name, sm) for row in CAPABILITIES for sm in row.sm]
    assert len(named) == len(set(named)), "a thing is spoken of twice on one target"


def test_the_dtypes_of_a_block():
    turing, ada = parse_target("sm_75"), parse_target("sm_89")
    assert refuses_dtypes(turing, {f16}, {f16, f32}) == ""  # float32 beside the products is fine
    assert "matmuls in float32" in refuses_dtypes(turing, {f32}, {f32})
    assert "bfloat16" in refuses_dtypes(turing, {f16}, {bf16})
    assert "float64" in refuses_dtypes(ada, {f32}, {f64})
    assert refuses_dtypes(ada, {bf16}, {f32}) == ""


def test_an_unknown_target_is_refused():
    with pytest.raises(UsageError, match="target 'sm_70' is not a compute capability"):
        parse_target("sm_70")


@pytest.mark.parametrize(
    ("target", "dtype", "said"),
    [
        ("sm_75", f32, "FP32 GEMM is not supported"),
        ("sm_75", bf16, "HW-specific datatypes: b16"),
    ],
)
def test_the_builder_still_refuses_it(target, dtype, said):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineBuildError, match=said):
        build_site(make_site(dtype=dtype, bias=False), by_name("dense"), target)
