"""What is told of ties where no rewritten block makes the choice."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.backends.onnxrt.ties import tie_note
from moeopt.errors import NotEquivalentError
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


class SkipsTokens(nn.Module):
    """Mixture of depths: the half of the tokens with the largest scores goes through the block, the rest around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.score, self.block = nn.Linear(16, 1), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        score, at = self.score(x)[..., 0].topk(8, dim=1)
        index = at[..., None].expand(-1, -1, 16)
        return x.scatter_add(1, index, self.block(x.gather(1, index)) * score.sigmoid()[..., None])


def test_a_model_without_experts_that_chooses_among_tokens_has_an_engine():
    model, x = SkipsTokens().eval(), rand(2, 16, 16)
    engine = moeopt.optimize(model, x, backend="onnxruntime")
    assert engine.certificate.passed is True
    told = " ".join(str(engine.certificate).split())
    assert "code that was left as it is chooses between equal scores" in told  # of rows of zeros
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_engine_that_is_wrong_on_ordinary_rows_is_refused_all_the_same(monkeypatch):
    wrong = OnnxEngine.__call__
    monkeypatch.setattr(OnnxEngine, "__call__", lambda self, *args, **kwargs: wrong(self, *args, **kwargs) * 1.01)
    with pytest.raises(NotEquivalentError, match="moves by"):
        moeopt.optimize(SkipsTokens().eval(), rand(2, 16, 16), backend="onnxruntime")
