"""A model that was changed after it was optimised is not saved as what it was: the bundle would hold the old code."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError, StaleModelWarning
from tests.toy_moe import Block, H, X, build, close, optimized


def another_activation(model):
    model.experts[1].act = nn.ReLU()


def another_number_of_experts(model):
    model.top_k = 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [(another_activation, "a module in experts.1 was replaced"), (another_number_of_experts, "top_k")],
)
def test_it_is_refused_with_what_changed(tmp_path, change, reason):
    opt = optimized(build(), verify="off")
    change(opt.model)
    text = rf"Block is no longer what was verified \(.*{reason}.*\), and a bundle would hold the old code: optimise"
    with pytest.raises(NotSaveableError, match=text):
        opt.save(tmp_path / "b")
    assert not list(tmp_path.iterdir())


class Words(nn.Module):
    """Runs in whichever dtype its weights have."""

    def __init__(self):
        super().__init__()
        self.words, self.block = nn.Embedding(9, H), Block()

    def forward(self, ids):
        return self.block(self.words(ids))


def test_weights_of_another_dtype_are_told_where_the_model_still_runs(tmp_path):
    opt = optimized(build(Words), torch.arange(6), verify="off")
    opt.double()
    text = (
        r"block is no longer what was verified \(it was called with torch.float64 where torch.float32 was verified\), "
        "and a bundle would hold its original code: optimise the model again$"
    )
    with pytest.warns(StaleModelWarning), pytest.raises(NotSaveableError, match=text):
        opt.save(tmp_path / "b")


def test_a_change_that_was_taken_back_or_is_of_weights_is_saved_as_it_is(tmp_path):
    opt = optimized(build(), verify="off")
    opt.model.top_k = 1
    opt.model.top_k = 2
    with torch.no_grad():
        opt.model.experts[0].w1.weight.mul_(3)
    opt.save(tmp_path / "b")
    close(moeopt.load(tmp_path / "b")(X), opt(X))


def test_a_model_that_was_cast_says_so_and_not_what_its_own_code_lacks(tmp_path):
    class Decides(Block):
        """Its own code has no graph, and no block was declined."""

        def loop(self, x, ids, w):
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                token, slot = torch.where(ids == e)
                if token.numel() > 0:
                    y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
            return y

    opt = optimized(build(Decides), verify="off")
    opt.half()
    text = (
        "Decides cannot be saved: it was changed after moeopt.optimize, and its example inputs fail .*float16.*: "
        r"change the model first \(dtype=, device= of moeopt.optimize do\), then optimise it$"
    )
    with pytest.raises(NotSaveableError, match=text):
        opt.save(tmp_path / "b")
