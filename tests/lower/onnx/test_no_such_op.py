"""What ONNX has no op for is said with what the call does and the way out."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError


class Bits(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(0, 1 << 14, (4, 4), dtype=torch.int16))

    def forward(self, x):
        return x @ self.codes.view(torch.float16).float()


@torch.library.custom_op("moeopt_tests_onnx::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class Foreign(nn.Module):
    def forward(self, x):
        return twice(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Bits, ("in forward reads the bits of a tensor as torch.float16, for which ONNX has no op",
                "hold it as torch.float16 (module.codes = module.codes.view(torch.float16))")),
        (Foreign, ("in forward calls moeopt_tests_onnx.twice.default, an op of moeopt_tests_onnx, and ONNX holds none "
                   "of another library: use backend='torch'",)),
    ],
)  # fmt: skip
def test_the_call_is_named_with_the_way_out(make, words):
    with pytest.raises(NotSaveableError) as err:
        moeopt.optimize(make(), torch.randn(3, 4), backend="onnxruntime", verify="off")
    assert all(part in str(err.value) for part in words), err.value
