"""Codes with zero points, in the forms of ``MatMulNBits`` that keep them as codes."""

import pytest
import torch

from moeopt.backends.onnxrt.lowerings.quantized import _blob, _zeros
from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.quantized_weight import QuantizedWeight

N, K = 6, 40


@pytest.mark.parametrize(
    ("codes", "block"), [("uint4", 16), ("uint8", 16), ("int8", 16), ("uint8", None), ("int8", None)]
)
def test_the_bytes_stand_for_the_same_weight(codes, block):
    generator = torch.Generator().manual_seed(0)
    format = WeightFormat("own", codes, (1, block), symmetric=False)
    blocks, low = format.scale_shape((N, K))[1], -128 if codes == "int8" else 0
    most = 16 if codes == "uint4" else 256
    zeros = torch.randint(low, low + most, (N, blocks), generator=generator).to(format.code_dtype)
    held = torch.randint(low, low + 256, format.code_shape((N, K)), generator=generator).to(format.code_dtype)
    scales = torch.rand(N, blocks, generator=generator)
    weight = QuantizedWeight(held, scales, zeros, format, (N, K))
    order = torch.randperm(N, generator=generator)
    size = block or 16
    count = -(-K // size)
    blob, points = _blob(weight, order, count, size), _zeros(weight, order, count)
    if codes == "uint4":
        blob = torch.stack([blob & 15, blob >> 4], -1).flatten(-2)
        points = torch.stack([points & 15, points >> 4], -1).flatten(-2)[:, :count]
    made = (blob.double() - points[..., None].double()) * scales[order].expand(-1, count)[..., None].double()
    assert torch.equal(made.flatten(1)[:, :K], weight.dequantize(torch.float64)[order])
