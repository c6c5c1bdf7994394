"""Row functions in PyTorch: taken where counted calls say so, and by an engine whatever they say."""

import torch
from torch import nn

import moeopt
from tests.zoo.row_functions import D, DenseMixture, NormInside, Routed


def block(model, **options):
    torch.manual_seed(0)
    (found,) = [
        b for b in moeopt.optimize(model.eval(), torch.randn(2, 7, D), **options).report.blocks if b.kind == "moe"
    ]
    return found


def test_few_experts_are_left_alone_and_many_are_taken():
    few, many = block(Routed(NormInside, n=3)), block(Routed(NormInside, n=16))
    assert few.status == "declined"
    assert few.reason.startswith(
        "its experts are two matmuls with native_layer_norm, a function of a row that no grouped"
    )
    assert "would not pay here" in few.reason and "backend='onnxruntime' takes it" in few.reason
    assert few.experts == 3 or few.experts is None
    assert many.status == "rewritten" and many.experts == 16
    assert many.lowering == "moeopt::row_function (expert by expert, one op)"


def test_rows_that_are_thrown_away_count():
    """All experts on all rows, of which the gate keeps one: what is saved grows with the size of the experts."""

    class KeepOne(DenseMixture):
        def forward(self, x):
            score = self.gate(x).softmax(-1)
            best, which = score.max(-1, keepdim=True)
            kept = torch.zeros_like(score).scatter(-1, which, best)
            return (torch.stack([net(x) for net in self.nets], 1) * kept.unsqueeze(-1)).sum(1)

    def deep(width):
        return lambda: nn.Sequential(
            nn.Linear(D, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, D)
        )

    torch.manual_seed(0)
    x = torch.randn(9, D)
    small, large = (moeopt.optimize(KeepOne(deep(w)).eval(), x).report.blocks[0] for w in (12, 512))
    assert (small.status, large.status) == ("declined", "rewritten"), (small.reason, large.reason)
