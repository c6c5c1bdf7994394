"""assert_equivalent and the bundle check on ONNX Runtime engines."""

import copy

import pytest
import torch

import moeopt
from moeopt.errors import UsageError
from moeopt.testing import assert_equivalent, check_bundle, providers
from tests.backends.onnxrt import toys as onnx_toys


def test_an_engine_is_compared_end_to_end(onnx_optimized, onnx_pristine):
    model, inputs = onnx_toys.net(), onnx_toys.call(batch=3)
    certificate = assert_equivalent(model, onnx_optimized, inputs)
    assert certificate.device == "onnxruntime cpu" and not certificate.blocks
    assert assert_equivalent(model, moeopt.load(onnx_pristine), inputs).executed
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    with pytest.raises(AssertionError, match="end to end: output 0"):
        assert_equivalent(other, onnx_optimized, inputs)


def test_each_provider_is_there_or_has_a_reason(onnx_pristine):
    found = providers(onnx_pristine)
    assert found["cpu"] == "" and set(found) == {"cpu", "cuda", "tensorrt", "nv_tensorrt_rtx"}
    if not torch.cuda.is_available():
        assert "no TensorrtExecutionProvider on this machine, or no GPU for it" in found["tensorrt"]
    assert check_bundle(onnx_pristine, "cpu", onnx_pristine / "certificate.json").failure() == ""


def test_a_runtime_that_is_not_installed_is_an_error_and_not_a_skip(onnx_pristine, monkeypatch):
    def missing():
        raise UsageError("backend 'onnxruntime' needs onnxruntime")

    monkeypatch.setattr("moeopt.backends.onnxrt.providers.available", missing)
    with pytest.raises(UsageError, match="needs onnxruntime"):
        providers(onnx_pristine)
