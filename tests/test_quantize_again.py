"""What an engine is compared with is the original, quantised again with the options that the engine was made with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.errors import UsageError
from tests.toy_moe import build

X = torch.randn(30, 16, generator=torch.Generator().manual_seed(3))
ROWS = torch.randn(300, 16, generator=torch.Generator().manual_seed(7))


class Swiglu(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.sample(3)
@pytest.mark.parametrize("groups", [None, "coactivation"])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_an_engine_of_a_dense_ffn_in_groups(method, groups):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Swiglu().eval()
    opt = moeopt.optimize(
        model, X, backend="onnxruntime", dense="split", experts=3, groups=groups, verify="fast",
        quantize=moeopt.QuantPlan(default="int4", method=method), calibration=ROWS if method == "gptq" else None,
    )  # fmt: skip
    assert opt.certificate.passed is True and opt.certificate.quantized
    again = moeopt.verify(opt, original=model)
    assert again.passed is True, again
    with torch.no_grad():
        model.down.weight[3] += 1.0
    assert moeopt.verify(opt, original=model).passed is False


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_data_and_calibration_are_cast_as_the_model_is(backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    plan = moeopt.QuantPlan(default="int4", method="gptq")
    opt = moeopt.optimize(
        build(), X, backend=backend, dtype="bfloat16", quantize=plan, calibration=ROWS, data=X, verify="fast"
    )
    plain = moeopt.optimize(
        build().bfloat16(), X.bfloat16(), backend=backend, quantize=plan, calibration=ROWS.bfloat16(), verify="fast"
    )
    assert opt.certificate.passed is True
    assert opt.certificate.loss["error_mean"] == pytest.approx(plain.certificate.loss["error_mean"], rel=1e-3)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_model_that_is_codes_already_is_told(backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    opt = moeopt.optimize(build(), X, quantize="int4", verify="fast")
    for quantize in ("int8", None):
        with pytest.raises(
            UsageError, match="the experts of Block are codes already: this model was quantised by moeopt"
        ):
            moeopt.optimize(opt.model, X, backend=backend, quantize=quantize)
    with pytest.raises(UsageError, match="codes already.*optimise the original model instead"):
        moeopt.explain(opt.model, X)


def test_rows_that_overflow_stop_it_and_leave_no_float_block_behind():
    plan = moeopt.QuantPlan(default="int4", method="gptq")
    with pytest.raises(
        UsageError, match=r"hold or become NaN, infinity or numbers too large to square where they reach"
    ):
        moeopt.optimize(build(), X, quantize=plan, calibration=ROWS * 1e30, verify="fast")


def test_a_cache_that_is_asked_for_in_few_bits_is_told():
    pytest.importorskip("onnxruntime")
    plan = moeopt.QuantPlan(default="int4", products={"past_key_values": "int8"})
    with pytest.raises(UsageError, match="the products are none; key/value caches of engines stay floats: no operator"):
        moeopt.optimize(build(), X, backend="onnxruntime", quantize=plan, verify="fast")
