"""A router's choice between scores that rounding does not tell apart, which ONNX Runtime makes otherwise."""

import pytest
import torch
from torch import nn

from moeopt.backends.onnxrt.onnx_file.close_choices import nearer_of
from moeopt.backends.onnxrt.onnx_file.parts import explained_distance
from moeopt.errors import Declined

E, K, H = 5, 2, 8
SCORES = [
    [0.1, 0.3, 0.25, 0.25, 0.05],
    [0.3, 0.1, 0.2, 0.25, 0.15],
    [0.3, 0.3, 0.1, 0.2, 0.0],
    [0.25, 0.25, 0.25, 0, 1],
]


class Chosen(nn.Module):
    """Rows times one number for each expert that their scores choose: ``ids`` says which, None: the largest."""

    def __init__(self, how, ids=None):
        super().__init__()
        self.how, self.ids = how, ids
        self.scale = nn.Parameter(torch.arange(1.0, E + 1).half())

    def forward(self, x, scores):
        if self.how == "order":
            ids = scores.sort(dim=-1, descending=True, stable=True).indices[..., :K]
        else:
            ids = scores.topk(K, -1).indices
        ids = ids if self.ids is None else self.ids
        return (self.scale[ids] * scores.gather(-1, ids)).sum(-1, keepdim=True) * x


def case(how, ids):
    x = torch.randn(4, H, generator=torch.Generator().manual_seed(0)).half()
    scores = torch.tensor(SCORES).half()
    theirs = Chosen(how, torch.tensor(ids))(x, scores)
    return Chosen(how).eval(), (x, scores), [theirs.detach()]


@pytest.mark.parametrize("how", ["order", "some"])
@pytest.mark.parametrize("ids", [[1, 2], [1, 3]])
def test_either_choice_between_equal_scores_is_explained(how, ids):
    assert explained_distance(*case(how, [ids, [0, 3], [0, 1], [4, 0]])) < 1e-2


@pytest.mark.parametrize("how", ["order", "some"])
@pytest.mark.parametrize("last", [[0, 1], [0, 2], [1, 2], [2, 1]])
def test_any_two_of_three_equal_scores_are_explained(how, last):
    module, (x, scores), _ = case(how, [[1, 2], [0, 3], [0, 1], [4, 0]])
    scores[3] = torch.tensor([0.25, 0.25, 0.25, 0, 0.1]).half()
    theirs = Chosen(how, torch.tensor([[1, 2], [0, 3], [0, 1], last]))(x, scores)
    assert explained_distance(module, (x, scores), [theirs.detach()]) < 1e-2


def test_an_oracle_that_cannot_run_says_why(monkeypatch):
    from moeopt.backends.onnxrt.onnx_file import parts
    from moeopt.verification.selections import OracleError

    def stops(*args):
        raise OracleError("the float64 oracle cannot run aten.foo")

    monkeypatch.setattr(parts, "run_oracle", stops)
    with pytest.raises(Declined, match="float64 cannot tell which is right: the float64 oracle cannot run aten.foo"):
        explained_distance(*case("some", [[1, 4], [0, 3], [0, 1], [4, 0]]))


@pytest.mark.parametrize("how", ["order", "some"])
def test_a_choice_of_a_lower_score_is_not_explained(how):
    with pytest.raises(Declined, match="ONNX Runtime's result is .* rounding explains .* please report this"):
        explained_distance(*case(how, [[1, 2], [0, 2], [0, 1], [4, 0]]))
    with pytest.raises(Declined, match="please report this"):
        explained_distance(*case(how, [[1, 4], [0, 3], [0, 1], [4, 0]]))


def test_the_nearer_result_is_taken_token_by_token():
    one, other = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    theirs = one.clone()
    theirs[0, :, 1] = 1.1  # the nearer one is 1 there
    found = nearer_of(theirs, one, other, 1)
    assert found[0, :, 1].eq(1).all() and found.sum() == 3
    assert torch.equal(nearer_of(theirs[1, 0], one[1, 0], other[1, 0], 1), one[1, 0])
