"""Shared by the tests of the tape: a module around a function, and a replay of a whole tape on other inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from moeopt.capture.replay import replay
from moeopt.capture.tape import Tape, record
from moeopt.capture.tree import tree_leaves, tree_map


class Run(nn.Module):
    """``fn(module, *args)`` as a forward; keyword tensors become Parameters, modules become children."""

    def __init__(self, fn: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *args: Any) -> Any:
        return self.fn(self, *args)


def recorded(fn: Callable[..., Any], *args: Any, **parts: Any) -> Tape:
    """The tape of ``fn(module, *args)``."""
    return record(Run(fn, **parts), args)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def again(tape: Tape, *tensors: torch.Tensor) -> Any:
    """The outputs and the final inputs of the tape's graph on other inputs: what a rewrite would compute."""
    inputs = [n for n in tape.nodes if n.op == "placeholder"]
    assert len(inputs) == len(tensors)
    calls = [n for n in tape.nodes if n.op == "call_function"]
    env = replay(tape, calls, {n: t.clone() for n, t in zip(inputs, tensors, strict=True)})

    def look(node: fx.Node) -> Any:
        return env[node] if node in env else tape.value(node)

    return tree_map(fx.Node, look, (tape.output, [tape.mutations.get(n, n) for n in inputs]))


def assert_equal(got: Any, want: Any) -> None:
    """Bit for bit the same leaves (NaN equals NaN)."""
    got, want = list(tree_leaves(got)), list(tree_leaves(want))
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, f"leaf {i}: {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
            assert torch.equal(a.nan_to_num(nan=77.0), b.nan_to_num(nan=77.0)), f"leaf {i} differs:\n{a}\n{b}"
        else:
            assert a == b, f"leaf {i}: {a!r}, not {b!r}"
