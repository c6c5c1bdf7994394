"""A home-made MoE block, optimised, verified, saved, loaded and checked again: what `make examples` runs."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import moeopt


class TwoOfEight(nn.Module):
    """A softmax router and a loop over experts, as in a hundred notebooks; nothing in it names moeopt."""

    def __init__(self, hidden: int = 64, intermediate: int = 256, experts: int = 8) -> None:
        super().__init__()
        self.choose = nn.Linear(hidden, experts, bias=False)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, intermediate), nn.GELU(), nn.Linear(intermediate, hidden))
            for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.choose(rows).softmax(-1).topk(2)
        y = torch.zeros_like(rows)
        for e, part in enumerate(self.parts):
            token, slot = torch.where(chosen == e)
            if token.numel() > 0:
                y.index_add_(0, token, part(rows[token]) * weights[token, slot, None])
        return y.view_as(x)


def main() -> None:
    torch.manual_seed(0)
    model, x = TwoOfEight().eval(), torch.randn(2, 16, 64)

    fast = moeopt.optimize(model, x)
    print(fast.report, fast.certificate, sep="\n\n", end="\n\n")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bundle = Path(folder) / "bundle"
        fast.save(bundle)
        again = moeopt.load(bundle)
        same = torch.equal(again(x), fast(x))
        print(f"saved and loaded: {'bit for bit the same' if same else 'NOT the same'}")
        print(f"checked where it was loaded: {'passed' if moeopt.verify(bundle).passed else 'FAILED'}")


if __name__ == "__main__":
    main()
