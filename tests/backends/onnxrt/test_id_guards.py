"""Engines and expert ids that name no expert: the model's own numbers, or a refusal that says so."""

import pytest
import torch

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.errors import UsageError
from tests.pipeline.given_ids import BLOCKS, OUTSIDE, E, LoopOverUnique, call, made, outcome

pytestmark = pytest.mark.one_isa  # ids that a graph refuses


@pytest.mark.sample(2)
@pytest.mark.parametrize("block", BLOCKS)
def test_an_engine_gives_the_same_or_stops(block):
    model = made(block)
    engine = moeopt.optimize(model, call(), backend="onnxruntime")
    for outside in (None, *OUTSIDE):
        want, got = outcome(model, *call(outside)), outcome(engine, *call(outside))
        assert (want is None) == (got is None), outside
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_refusal_says_what_was_outside_and_the_way_out():
    engine = moeopt.optimize(made(LoopOverUnique), call(), backend="onnxruntime")
    with pytest.raises(UsageError, match="expert ids of this call are outside the range that was verified.*original"):
        engine(*call(E))
