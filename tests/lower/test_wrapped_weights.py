"""Weights that are a quantiser's own class of tensor: declined in PyTorch and refused in an engine, both by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError
from moeopt.lower.wrapped_weights import wrapped_weights_named
from tests.toy_moe import X, build


class CodedTensor(torch.Tensor):
    """int8 codes and a scale a row that pass for a float matrix, as torchao's tensors do."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return CodedTensor(inner["codes"], inner["scale"])

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].dequantize(), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return CodedTensor(args[0].codes, args[0].scale)
        raise NotImplementedError(f"CodedTensor dispatch: {function}")


def coded():
    model = build()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(CodedTensor(codes, scale), requires_grad=False)
    return model


def test_an_engine_names_the_weight_the_class_and_the_way_out():
    with pytest.raises(NotSaveableError) as err:
        moeopt.optimize(coded(), X, backend="onnxruntime", verify="fast")
    for text in ("weight (and ", "is a CodedTensor of tests", "module.weight.dequantize()", "quantize='int8'"):
        assert text in str(err.value)


def test_in_pytorch_the_block_is_declined_with_the_package():
    (block,) = moeopt.optimize(coded(), X, verify="fast").report.blocks
    assert block.status == "declined"
    for text in ("is a CodedTensor, which the op cannot read", "dequantize()", "its class is one of tests"):
        assert text in block.reason


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^of plain weights$"), wrapped_weights_named(build()):
        raise RuntimeError("of plain weights")
