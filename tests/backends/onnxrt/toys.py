"""A small mixture with a mask and a nested result, its bundle, and the edits that tests make to bundles."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moeopt

H, I, E, K = 8, 12, 4, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(H, I), nn.Linear(H, I, bias=False), nn.Linear(I, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E, bias=False), nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, H)
        weights, ids = torch.topk(self.gate(flat).softmax(-1), K)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            if len(tokens):
                y.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, slots, None])
        return y.reshape(x.shape)


class Net(nn.Module):
    """Two blocks of one kind; ``x`` goes in, and a result named as an input comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        states = []
        for layer in self.layers:
            x = x + layer(x)
            states.append(x)
        return {"x": x * mask[..., None], "states": tuple(states)}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def call(batch: int = 2, tokens: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, tokens, H, generator=generator), "mask": torch.ones(batch, tokens)}


def optimized(seed: int = 0) -> Any:
    return moeopt.optimize(net(seed), call(), backend="onnxruntime", verify="fast")


def edit(path: Path, change: Any) -> None:
    """Change a JSON file in place; ``change`` gets the data."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def reseal(bundle: Path) -> Path:
    """Make the manifest agree with the files again, as an attacker would."""

    def change(data: Any) -> None:
        for name in data["files"]:
            blob = (bundle / name).read_bytes()
            data["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}

    edit(bundle / "moeopt.json", change)
    return bundle


def edit_graph(bundle: Path, change: Any) -> Path:
    """Change the protobuf of ``model.onnx`` in place, and reseal; ``change`` gets it."""
    import onnx

    proto = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(proto)
    (bundle / "model.onnx").write_bytes(proto.SerializeToString())
    return reseal(bundle)
