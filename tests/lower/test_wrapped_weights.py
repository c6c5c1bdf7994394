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


class Packed(nn.Parameter):
    """Codes of a quantiser whose class is no wrapper that PyTorch knows, as bitsandbytes' are."""

    scale: torch.Tensor


class PackedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.data * self.weight.scale)


def test_an_engine_names_a_weight_that_is_no_wrapper_of_pytorchs_either():
    model = build()
    for expert in model.experts:
        layer = PackedLinear(expert.w1.in_features, expert.w1.out_features, bias=False)
        layer.weight = Packed(expert.w1.weight.detach().round(), requires_grad=False)
        layer.weight.scale = torch.ones(1)
        expert.w1 = layer
    with pytest.raises(NotSaveableError) as err:
        moeopt.optimize(model, X, backend="onnxruntime", verify="fast")
    assert "experts.0.w1.weight (and 3 more) is a Packed of tests, which no graph holds" in str(err.value)


class Sparse(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        self.mix = nn.Parameter(torch.eye(X.shape[-1]).to_sparse_csr(), requires_grad=False)

    def forward(self, x):
        return self.block((self.mix @ x.flatten(0, -2).t()).t().reshape(x.shape))


def test_an_engine_names_a_sparse_weight():
    with pytest.raises(NotSaveableError) as err:
        moeopt.optimize(Sparse(build()), X, backend="onnxruntime", verify="off")
    assert "Sparse cannot become an engine: mix is a tensor of torch.sparse_csr, which no graph holds" in str(err.value)
    assert "weight.to_dense()" in str(err.value) and "backend='torch'" in str(err.value)


def test_a_graph_that_cannot_be_written_names_the_block_that_was_declined():
    model = build()
    for expert in model.experts:
        torch.nn.utils.parametrize.register_parametrization(expert.w1, "weight", Odd())
    with pytest.raises(NotSaveableError) as err:
        moeopt.optimize(nn.Sequential(model), X, backend="onnxruntime", verify="fast")
    assert "The MoE block 0 was declined, so the graph would hold its own code: " in str(err.value)
    assert str(err.value).endswith(moeopt.optimize(nn.Sequential(model), X, verify="fast").report.declined[0].reason)


class Odd(nn.Module):
    """Which no graph holds: a branch on a value that is another in each call."""

    def forward(self, w):
        return w * 2 if torch.rand(()).item() > 2 else w


class Dequantised(nn.Module):
    """A product whose weight is one of PyTorch's own quantised tensors."""

    def __init__(self, weight, how):
        super().__init__()
        top = weight.abs().amax(1) / 127
        if how == "channel":
            codes = torch.quantize_per_channel(weight, top, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)
        else:
            codes = torch.quantize_per_tensor(weight, float(top.max()), 0, torch.qint8)
        if how == "parameter":
            self.weight = nn.Parameter(codes, requires_grad=False)
        else:
            self.register_buffer("weight", codes)

    def forward(self, x):
        return F.linear(x, self.weight.dequantize())


@pytest.mark.parametrize("how", ["channel", "tensor", "parameter"])
def test_quantised_tensors_of_pytorch(how):
    model = build()
    for expert in model.experts:
        for name in ("w1", "w2", "w3"):
            setattr(expert, name, Dequantised(getattr(expert, name).weight.detach(), how))
    model.eval()
    opt = moeopt.optimize(model, X)
    (block,) = opt.report.blocks
    assert block.status == "declined" and torch.equal(opt(X), model(X))
    assert "experts.0.w1.weight is a tensor of torch.qint8, one of PyTorch's own quantised tensors" in block.reason
    assert "give the float model, or make floats of it (dequantize()), and optimise again" in block.reason
    with pytest.raises(
        NotSaveableError, match=r"experts.0.w1.weight \(and 11 more\) is a tensor of torch.qint8, which"
    ):
        moeopt.optimize(model, X, backend="onnxruntime", verify="fast")
