"""A block rewritten into ``moeopt::experts`` is judged like any other, and its float64 run is the op's definition."""

import pytest
import torch
from torch import nn

from moeopt.capture.call_roles import ArgRole, CallSpec
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.ops.experts import experts
from moeopt.verification.block import verify_block
from moeopt.verification.cases import adversarial_cases
from tests.verification.tiny import E, H, TinyMoE, seeded


class Rewritten(nn.Module):
    def __init__(self, moe, spec):
        super().__init__()
        self.moe, self.spec = moe, spec

    def forward(self, x_BSH):
        m, x_TH = self.moe, x_BSH.reshape(-1, H)
        ids_TK, w_TK = m.route(x_TH)
        bank = StackedExpertWeights([m.gate_EIH, m.up_EIH], m.down_EHI, None, m.bias_EH, None)
        return experts(x_TH, ids_TK, w_TK, bank, self.spec).view_as(x_BSH)


def check(dtype, **spec):
    moe = TinyMoE().to(dtype)
    cases = adversarial_cases(CallSpec((seeded(2, 5, H, dtype=dtype),), {}, (ArgRole("tokens", 2),)), E)
    return verify_block("moe", moe, Rewritten(moe, ExpertsSpec(rows="separate", **spec)), cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_op_passes(dtype):
    result = check(dtype, combine="expert")
    assert result.passed, result.reason
    exact = {case.name: case.distance_exact for case in result.cases}
    assert exact.pop("a nan row alone") is None, "there is nothing to measure"
    assert all(distance is not None and distance < 1e-12 for distance in exact.values())


@pytest.mark.parametrize("spec", [{"activation": "gelu"}, {"w_out_layout": "io"}, {"up_offset": 1.0}, {"up_max": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_spec_is_caught(dtype, spec):
    assert check(dtype, **spec).passed is False
