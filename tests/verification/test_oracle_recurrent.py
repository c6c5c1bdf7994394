"""The float64 oracle runs recurrent layers that read what another layer gave: torch compares dtypes in Python there."""

import pytest
import torch
from torch import nn

from moeopt.patches import recurrent_inputs_of_any_dtype
from moeopt.verification.oracle import record_selections, run_oracle


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_layer_behind_another_runs_in_float64(layer):
    torch.manual_seed(0)
    first, second = nn.GRU(6, 6, batch_first=True), layer(6, 5, batch_first=True)

    def forward(x):
        return second(first(x)[0])[0]

    x = torch.randn(2, 4, 6)
    _, selections = record_selections(forward, (x,), {})
    exact = run_oracle(forward, (x,), {}, selections)
    want = second.double()(first.double()(x.double())[0])[0]
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, want, rtol=1e-12, atol=1e-12)


def test_sizes_are_checked_and_dtypes_again_afterwards():
    layer, x = nn.GRU(6, 6), torch.randn(4, 2, 6, dtype=torch.float64)
    with recurrent_inputs_of_any_dtype(), pytest.raises(RuntimeError, match=r"Expected 6, got 5"):
        layer(x[..., :5])
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match"):
        layer(x)
