"""Small models that between them use every part of a graph that a bundle has to carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from moeopt.backends.torch.bundle import save_torch_bundle
from moeopt.report import BlockReport, Report

H, I, E, K = 8, 16, 4, 2
DYNAMIC = Dim.DYNAMIC

REPORT = Report((BlockReport("mlp", "moe", "rewritten", experts=E, lowering="moeopt::experts"),), model="toy")


class Certificate:
    def to_json(self) -> str:
        return '{"passed": true}'


class Toy(nn.Module):
    """Keywords, tied weights, a written buffer, a constant, an in-place write, no_grad, autocast and nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.twin = nn.Linear(H, I), nn.Linear(I, H), nn.Linear(I, H)
        self.twin.weight = self.down.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.shift = torch.linspace(0, 1, H)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 2.0) -> dict[str, Any]:
        with torch.no_grad():
            position = torch.arange(x.shape[0], device=x.device)
        with torch.autocast("cpu", enabled=False):
            double = x.float() * 2
        self.calls += 1
        h = torch.nn.functional.gelu(self.up(x))
        h[:, 0] = 1
        y = self.down(h) + self.twin(h) * scale + self.shift
        if mask is not None:
            y = y.masked_fill(mask, float("-inf"))
        return {"y": y, "position": position + x.shape[0], "rest": (list(double.split([3, 5], -1)), None, 3)}


class Stacked(nn.Module):
    """Experts that are views of one stack, read both ways: the stack and each view must be stored once."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(E, H, H))
        self.parts = nn.ParameterList([nn.Parameter(self.stack.detach()[e]) for e in range(E)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("th,ehk->tk", x, self.stack)
        for part in self.parts:
            y = y + x @ part
        return y


def build(cls: type[nn.Module] = Toy, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cls().eval()


def rows(count: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, shapes: Any = None) -> Any:
    with torch.no_grad():
        return torch.export.export(model, args, kwargs or {}, dynamic_shapes=shapes, strict=False)


def save(directory: Path, model: nn.Module | None = None, **fields: Any) -> Path:
    """A bundle of ``model`` (a small MLP if None) with one golden run and a dynamic number of rows."""
    model = model or nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)).eval()
    x = rows()
    program = export(model, (x,), shapes=({0: DYNAMIC},))
    if "golden_inputs" not in fields:
        with torch.no_grad():
            fields = {"golden_inputs": [((x,), {})], "golden_outputs": [model(x)]} | fields
    return save_torch_bundle(program, directory, report=REPORT, certificate=Certificate(), **fields)
