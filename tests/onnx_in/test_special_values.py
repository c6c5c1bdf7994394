"""Every operator of the interpreter on values that are no ordinary numbers, beside ONNX Runtime.

Where ONNX Runtime itself is wrong, a case says so, and ONNX's reference implementation decides.
"""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from moeopt.onnx_in.operators.table import OPERATORS
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.whole_file import interpreted
from tests.onnx_in.special_cases import CASES

NEAR = {"float16": 2e-3, "float32": 2e-5, "float64": 1e-9}


def expected(case):
    model, feeds = case.model(), {f"x{i}": x for i, x in enumerate(case.inputs)}
    if case.by:
        with np.errstate(all="ignore"):
            return ReferenceEvaluator(model).run(None, feeds)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def given(case):
    module = interpreted(read_onnx(case.model()), tuple(case.inputs))
    made = module(*(torch.from_numpy(x.copy()) for x in case.inputs))
    return [y.numpy() for y in (made if isinstance(made, tuple) else [made])]


def same(got, want):
    """By element: both NaN, the same infinity, or within rounding."""
    if got.dtype.kind != "f":
        return got == want
    near = NEAR[str(got.dtype)]
    with np.errstate(all="ignore"):
        distance = np.abs(got.astype("float64") - want.astype("float64"))
        close = distance <= near * np.abs(want.astype("float64")) + near / 100
    return close | (got == want) | (np.isnan(got) & np.isnan(want))


@pytest.mark.parametrize("op", CASES)
def test_it_gives_what_the_file_gives(op):
    for case in CASES[op]:
        for got, want in zip(given(case), expected(case), strict=True):
            want = np.asarray(want)
            what = f"{[f'{x.dtype}{x.shape}' for x in case.inputs]} {case.constants} {case.attributes}"
            assert (got.dtype, got.shape) == (want.dtype, want.shape), what
            wrong = ~same(got, want)
            assert not wrong.any(), f"{what}: {got[wrong][:3]} instead of {want[wrong][:3]} in {wrong.sum()} places"


def test_no_operator_is_left_out():
    named = {f"{domain}.{op}" if domain else op for domain, op in OPERATORS}
    others = {"Scatter", "SequenceConstruct", "ConcatFromSequence"}  # ScatterElements since opset 11; no tensors alone
    assert named - set(CASES) == others
