"""The two programs of a mixer, as functions of its weights, and whether they are one function.

Shape legend: B rows, S new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.causal_lm.layers import make_layer, parts_of
from moeopt.causal_lm.mixers import Mixer
from moeopt.errors import Declined
from moeopt.patches import one_trace, quiet
from moeopt.value_types import FxTarget, PyObject

APART = 1e-5
"""How far the two programs may be apart, relative to the largest value: both round in float32, in another order."""


def weights_of(mixer: Mixer) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of its module by name."""
    return [*mixer.module.named_parameters(), *mixer.module.named_buffers()]


class MixerProgram:
    """A mixer as a function of weights, tokens (B, S, ...) and states (B, ...) to results (B, S, ...) and states."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        self.names = [name for name, _ in weights_of(mixer)]

    def __call__(self, weights: list[Tensor], tokens: list[Tensor], states: list[Tensor]) -> list[Tensor]:
        from transformers import DynamicCache
        from transformers.cache_utils import DummyLayer

        mixer, cache = self.mixer, DynamicCache()
        layer = make_layer(dict(zip(mixer.states, [state.clone() for state in states], strict=True)))
        cache.layers = [*[DummyLayer() for _ in range(mixer.layer)], layer]
        args, kwargs = mixer.arguments(tokens, cache)
        named = dict(zip(self.names, weights, strict=True))
        found = torch.func.functional_call(mixer.module, named, args, kwargs, tie_weights=False)
        results = [result for result in pytree.tree_leaves(found) if isinstance(result, Tensor)]
        now = parts_of(layer)
        return [*results, *(now[name] for name in mixer.states)]


class _MixerModule(nn.Module):
    """What ``torch.export`` takes; the mixer's module is not its child, so that its weights are arguments only."""

    def __init__(self, program: Callable[..., list[Tensor]]) -> None:
        super().__init__()
        self.program = (program,)

    def forward(self, weights: list[Tensor], tokens: list[Tensor], states: list[Tensor]) -> list[Tensor]:
        return self.program[0](weights, tokens, states)


def sized(tokens: Sequence[Tensor], size: int) -> list[Tensor]:
    """The tensors with ``size`` tokens, repeated or cut."""
    return [t.repeat(1, -(-size // t.shape[1]), *[1] * (t.dim() - 2))[:, :size].clone() for t in tokens]


def traced(mixer: Mixer, size: int) -> torch.export.ExportedProgram:
    """Its program for one token, or from a sample of ``size`` for any number of them."""
    weights, (tokens, states) = [t.detach() for _, t in weights_of(mixer)], mixer.sample()
    auto = torch.export.Dim.AUTO
    of_tokens: list[dict[int, Any]] = [{0: auto} for _ in tokens]
    if size > 1:
        of_tokens = [axes | {1: auto} for axes in of_tokens]
    free: PyObject = ([{} for _ in weights], of_tokens, [{0: auto} for _ in states])
    with one_trace, torch.no_grad(), quiet():
        call = (weights, sized(tokens, size), states)
        return torch.export.export(_MixerModule(MixerProgram(mixer)), call, dynamic_shapes=free, strict=False)


def operations(mixer: Mixer, size: int) -> int:
    """How many operations its program runs for ``size`` tokens."""
    weights, (tokens, states) = [t for _, t in weights_of(mixer)], mixer.sample()

    class CountOps(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(
            self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
        ) -> PyObject:
            self.number += 1
            return func(*args, **(kwargs or {}))

    count = CountOps()  # type: ignore[no-untyped-call]  # torch
    with torch.no_grad(), count:
        MixerProgram(mixer)(weights, sized(tokens, size), states)
    return count.number


def check_steps(mixer: Mixer) -> bool:
    """Whether its program for many tokens goes on from a state; both programs are the same function, token by token.

    Raises:
        Declined: they are not.
    """
    mixer = copy.copy(mixer)
    mixer.module = copy.deepcopy(mixer.module).float()
    weights, program = [t for _, t in weights_of(mixer)], MixerProgram(mixer)
    tokens, states = ([t.float() if t.is_floating_point() else t for t in part] for part in mixer.sample())
    with torch.no_grad():
        for begin in (states, [torch.zeros_like(state) for state in states]):
            many, held, rows = program(weights, tokens, begin), begin, []
            for at in range(tokens[0].shape[1]):
                one = program(weights, [t[:, at : at + 1] for t in tokens], held)
                held = one[-len(states) :]
                rows.append(one[: -len(states)])
            steps = [*(torch.cat(parts, 1) for parts in zip(*rows, strict=True)), *held]
            apart = [
                float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(steps, many, strict=True)
            ]
            if max(apart) <= APART:
                return begin is states
    raise Declined(
        f"{mixer.name} computes something else for one token than for several (apart by {max(apart):.1e} of the "
        "largest value), and how much it computes for several depends on their number, so that one graph cannot hold it"
    )
