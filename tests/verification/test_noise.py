"""Rounding noise is of each result's own dtype."""

import pytest
import torch
from torch import nn

from moeopt.verification.noise import Noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_result_moves_by_an_eps_of_its_dtype(dtype):
    model = nn.Sequential(nn.Identity())
    x = torch.linspace(1, 2, 64, dtype=dtype)
    with Noise(model, ["0"], seed=0):
        moved = (model(x).double() - x.double()).norm() / x.double().norm()
    assert 0 < moved < 2 * torch.finfo(dtype).eps
