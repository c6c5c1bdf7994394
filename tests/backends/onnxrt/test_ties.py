"""What is told of ties where no rewritten block makes the choice."""

import torch
from torch import nn

from moeopt.backends.onnxrt.ties import tie_note
from tests.capture.tiny import rand


class Chooses(nn.Module):
    """Not rewritten, and the result depends on which of equal scores is taken."""

    def forward(self, x):
        return x.topk(2).indices + 0.0 * x[..., :2]


def test_a_choice_of_a_block_that_is_left_alone_is_told():
    note = tie_note(Chooses(), ((rand(5, 6),), {}), "ONNX Runtime", None)
    assert note.startswith("a block that is left as it is chooses by the largest of some scores: tied rows")
    assert "may be treated otherwise on ONNX Runtime than in PyTorch; they were not counted" in note


def test_a_model_that_chooses_nothing_has_no_note():
    assert tie_note(nn.Linear(6, 2), ((torch.zeros(5, 6),), {}), "ONNX Runtime", None) == ""
