"""Which tables that are looked up by a choice are memories of values."""

import torch
from torch import nn

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
