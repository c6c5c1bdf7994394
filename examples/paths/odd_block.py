"""A researcher with blocks that nobody has seen: one is rewritten, one declined with its reason; both are saved."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import moeopt as library
from examples.paths.walk import moeopt


class SineExperts(nn.Module):
    """Top-1 experts with a norm inside and a sine for an activation: no expert function that moeopt knows by name."""

    def __init__(self, hidden: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.scores = nn.Linear(hidden, experts)
        self.first = nn.ModuleList(nn.Linear(hidden, 64) for _ in range(experts))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(experts))
        self.second = nn.ModuleList(nn.Linear(64, hidden) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.scores(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e in range(len(self.first)):
            rows = torch.where(chosen == e)[0]
            if len(rows):
                y[rows] = weight[rows, None] * self.second[e](torch.sin(self.norms[e](self.first[e](x[rows]))))
        return y


class SoftSlots(nn.Module):
    """Each expert works on slots that mix all tokens: no token goes to an expert, so there is nothing to group."""

    def __init__(self, hidden: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.slots = nn.Linear(hidden, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 64), nn.GELU(), nn.Linear(64, hidden)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.slots(x)
        mixed = scores.softmax(0).T @ x
        results = torch.cat([expert(mixed[e : e + 1]) for e, expert in enumerate(self.experts)])
        return scores.softmax(1) @ results


def build() -> tuple[nn.Module, torch.Tensor]:
    """What ``moeopt explain examples/paths/odd_block.py:build`` calls."""
    torch.manual_seed(0)
    return nn.Sequential(SineExperts(), SoftSlots()).eval(), torch.randn(12, 32)


def main(folder: Path) -> None:
    said = " ".join(moeopt("explain", f"{__file__}:build").split())
    assert "slots that mix tokens" in said, "the second block has no tokens to group"

    model, x = build()
    engine = library.optimize(model, x, backend="onnxruntime", dump=folder / "dump")
    (rewritten,) = engine.report.rewritten
    (declined,) = engine.report.declined
    print(f"\nrewritten: {rewritten.name}, {rewritten.spec}\ndeclined: {declined.name}, {declined.reason}")
    assert engine.certificate.passed and (rewritten.name, declined.name) == ("0", "1")

    bundle = engine.save(folder / "bundle")
    other = torch.randn(5, 32)
    with torch.no_grad():
        apart = (library.load(bundle)(other) - model(other)).abs().max().item()
    assert apart < 1e-5, apart
    print(f"the whole model is an engine, the declined block in its own operators; on other rows {apart:.0e} apart")
    print("what was read of each block:", *sorted(str(p.relative_to(folder)) for p in (folder / "dump").rglob("*.txt")))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
