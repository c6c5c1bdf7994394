"""Configuration objects that a block reads at each call, in the ways that people keep them."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.property.spec import Program


@dataclass
class Config:
    top_k: int
    norm: bool
    scale: float


KINDS: dict[str, Callable[..., Any]] = {
    "namespace": types.SimpleNamespace,
    "dataclass": Config,
    "dict": dict,
    "nested": lambda **fields: types.SimpleNamespace(name="moe", router=types.SimpleNamespace(**fields)),
    "nested dict": lambda **fields: {"name": "moe", "router": fields},
}


def make_config(p: Program) -> Any:
    return KINDS[p.config](top_k=p.top_k, norm=bool(p.router.renormalize), scale=p.router.scale)


def fields_of(config: Any) -> Any:
    """What holds the fields: the object itself, or its part ``router``."""
    if isinstance(config, dict):
        return config.get("router", config)
    return getattr(config, "router", config)


def read(config: Any, name: str) -> Any:
    fields = fields_of(config)
    return fields[name] if isinstance(fields, dict) else getattr(fields, name)


def change(model: nn.Module, name: str, value: Any) -> None:
    """Sets a field of every configuration object in the model, as its owner would."""
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is None:
            continue
        fields = fields_of(config)
        if isinstance(fields, dict):
            fields[name] = value
        else:
            setattr(fields, name, value)


def changes(p: Program) -> list[tuple[str, Any]]:
    """Other values that the program's own forward takes."""
    other_k = p.top_k - 1 if p.top_k > 1 else min(2, p.experts)
    made: list[tuple[str, Any]] = [("top_k", other_k), ("scale", p.router.scale * 1.5)]
    return [*made, ("norm", False)] if p.router.renormalize else made
