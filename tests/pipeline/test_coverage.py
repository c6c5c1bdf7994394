"""Experts that the given ids do not name are found all the same, wherever their weights lie."""

import pytest
import torch
from torch import nn

import moeopt
from tests.zoo.few_rows import Skipping

E, H, INNER = 8, 6, 5


class Given(nn.Module):
    """A loop over the ids that are given; ``packed``: the experts' rows lie under each other in one matrix."""

    def __init__(self, packed: bool):
        super().__init__()
        self.packed = packed
        w1, w2 = torch.randn(E, H, INNER), torch.randn(E, INNER, H)
        self.w1 = nn.Parameter(w1.flatten(0, 1) if packed else w1)
        self.w2 = nn.Parameter(w2.flatten(0, 1) if packed else w2)
        self.other = nn.Parameter(torch.randn(7, 1, H))  # as many as the ids seem to name, and no experts

    def forward(self, x, ids, weights):
        """``x`` (T, H), ``ids`` and ``weights`` (T, K)."""
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, k = torch.where(ids == e)
            w1, w2 = (w.view(E, -1, w.shape[-1])[e] for w in (self.w1, self.w2))
            y[t] += (torch.relu(x[t] @ w1) @ w2) * weights[t, k, None]
        return y + self.other.sum(0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("largest", [1, 3, 6])
def test_ids_beyond_those_of_the_example_reach_their_experts(packed, largest):
    torch.manual_seed(0)
    model = Given(packed).eval()
    x, weights = torch.randn(12, H), torch.rand(12, 2) + 0.1
    example = torch.stack([torch.arange(12) % (largest + 1), torch.arange(1, 13) % (largest + 1)], 1)
    optimised = moeopt.optimize(model, (x, example, weights), verify="fast")
    (block,) = optimised.report.blocks
    assert (block.status, block.experts) == ("rewritten", E), block.reason
    ids = torch.rand(12, E).argsort(-1)[:, :2]
    torch.testing.assert_close(optimised(x, ids, weights), model(x, ids, weights), rtol=1e-5, atol=1e-5)


class LongOnes(Skipping):
    """Calls of many tokens, in which a mask shows what it leaves out, compute something else."""

    def forward(self, x):
        y = super().forward(x)
        return y.relu() if len(x) > 100 else y


class LongHalves(Skipping):
    """The same calls of PyTorch, with another number."""

    def forward(self, x):
        return super().forward(x) * (0.5 if len(x) > 100 else 1.0)


@pytest.mark.parametrize(
    ("model", "status"), [(Skipping, "rewritten"), (LongOnes, "declined"), (LongHalves, "declined")]
)
def test_calls_of_more_tokens_speak_for_those_of_fewer_where_both_compute_the_same(model, status):
    torch.manual_seed(0)
    made = model().eval()
    x = torch.randn(6, made.gate.in_features)
    optimised = moeopt.optimize(made, x, verify="off")
    (block,) = optimised.report.blocks
    assert block.status == status
    torch.testing.assert_close(optimised(x), made(x), rtol=1e-5, atol=1e-6)
