"""Which tables that are looked up by a choice are memories of values."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.capture.tape import record
from moeopt.recognise.weights_for_rows import single_neurons

D, N = 8, 4


class Looked(nn.Module):
    """Rows of a table, one for each token: ``scores``: they weigh the token's own layer; else they are the result."""

    def __init__(self, scores: bool) -> None:
        super().__init__()
        self.table, self.layer, self.scores = nn.Parameter(torch.randn(N, D)), nn.Linear(D, D), scores

    def forward(self, x):
        weights, ids = (x @ self.table.t()).max(1)
        rows = self.table[ids]
        if self.scores:  # as of the centroids of BASE layers
            return (rows * x).sum(1, keepdim=True).sigmoid() * self.layer(x)
        return x + rows * weights[:, None]


def test_a_table_whose_rows_score_the_token_is_no_memory():
    torch.manual_seed(0)
    said = [single_neurons(record(Looked(scores), (torch.randn(9, D),), {})) for scores in (True, False)]
    assert said[0] is None
    assert said[1] is not None and said[1].reason.startswith("it is a memory: each id that the router picks is one row")


class Coded(nn.Module):
    """gpt-fast's quantised experts: each token gets the codes of its experts' matrices; floats before or after."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.gate, self.how = nn.Linear(D, N, bias=False), how
        for name, shape in (("w1", (N, 2 * D, D)), ("w2", (N, D, 2 * D))):
            self.register_buffer(name, torch.randint(-127, 128, shape, dtype=torch.int8))
            self.register_buffer(f"s{name}", torch.rand(shape[:2]) / 500)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        if self.how == "all":
            up, down = (getattr(self, n).float() * getattr(self, f"s{n}")[..., None] for n in ("w1", "w2"))
            y = torch.zeros_like(x)
            for e in range(N):
                token, slot = torch.where(ids == e)
                y = y.index_add(0, token, (x[token] @ up[e].t()).relu() @ down[e].t() * weights[token, slot, None])
            return y
        first = self.how == "floats first"
        w1, w2 = ((w.float()[ids] if first else w[ids].float()) for w in (self.w1, self.w2))
        h = torch.einsum("th,tkih->tki", x, w1) * self.sw1[ids]
        y = torch.einsum("tki,tkhi->tkh", h.relu(), w2) * self.sw2[ids]
        return torch.einsum("tkh,tk->th", y, weights)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("floats first", "its experts' weights are codes (w1), and each token gets a copy of the matrices of its "),
        ("codes first", "its experts' weights are codes (w1), and each token gets a copy of the matrices of its "),
        ("all", "its experts' weights are computed at each call (from integers"),
    ],
)
def test_codes_that_are_made_floats_for_each_token_are_told_as_such(how, words):
    torch.manual_seed(0)
    told = moeopt.explain(Coded(how).eval(), torch.randn(9, D))
    assert not told.rewritten and len(told.declined) == 1  # and nothing is said of the rows of scales beside them
    reason = told.declined[0].reason
    assert reason.startswith(words) and reason.endswith(
        "make floats of the codes of one expert where its rows are multiplied: such experts run on the codes"
    )
