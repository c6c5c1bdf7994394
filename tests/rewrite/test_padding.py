"""Padding by a simple function of the sizes is carried; up to a multiple it is declined by its own name."""

import pytest
import torch

from moeopt.errors import Declined
from moeopt.rewrite.kept_steps import KeptStep, KeptSteps, StepRef
from moeopt.rewrite.symbolic_shapes import generalize

aten = torch.ops.aten
SHAPES = [[(14, 8)], [(20, 8)], [(32, 8)]]


def padded(by):
    steps = [
        KeptStep("input", "input_0", (), source=""),
        KeptStep("call", aten.constant_pad_nd.default, (StepRef(0), [0, 0, 0, by], 0.0), source="model.py:4"),
    ]
    return KeptSteps(steps, StepRef(1), {}, {}, ())


def test_padding_up_to_a_multiple_is_declined_with_its_line():
    with pytest.raises(Declined, match="pads rows by 2 or 4 or 0, which .* leave the padding out") as caught:
        generalize([padded(by) for by in (2, 4, 0)], SHAPES)
    assert caught.value.where == "model.py:4"


@pytest.mark.parametrize("amounts", [(3, 3, 3), (14, 20, 32)])
def test_padding_by_a_constant_or_a_size_is_carried(amounts):
    generalize([padded(by) for by in amounts], SHAPES)
