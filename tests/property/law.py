"""The law for numbers: each token of an engine is as near to the float64 original as the model's own dtype explains.

    distance of the engine  <=  max(FLOOR[dtype], 8 * the original's own distance)        both relative, per token

Tokens whose choice of experts is a tie, exactly or within rounding, are set aside: nothing says which expert is right.
A token that is finite in the original must be finite in the engine. One that is not may be finite where its dtype alone
overflowed, or where the written form multiplied by zero what was not chosen: 0 * inf is NaN, and an op that does not
run the expert has none.

Shape legend: T tokens, E experts, K chosen per token, H hidden, N keys to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import run, tensors
from tests.property.forms import MULTIPLIES_BY_ZERO
from tests.property.spec import Program

aten = torch.ops.aten
FLOOR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}
OWN = 8.0
"""How many times the original's own rounding an engine, which adds in another order, may be away."""
SMALLEST = {torch.float64: 1e-290, torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-6}
"""Norms below are no number to be relative to: a token of zeros must be zeros."""


class Choices(TorchDispatchMode):
    """Records the keys of each choice of experts, and how many are taken."""

    def __init__(self, p: Program):
        super().__init__()
        self.p, self.made = p, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        taken = {aten.topk.default: args[1:2], aten.argmax.default: (1,), aten.max.dim: (1,), aten.sort.default: None}
        taken[aten.sort.stable] = None
        keys = args[0] if args else None
        if func in taken and keys.is_floating_point() and keys.dim() > 1 and keys.shape[-1] > 1:
            count = self.p.top_k if taken[func] is None else taken[func][0]
            if count < keys.shape[-1]:
                self.made.append((keys.detach().double(), count))
        return func(*args, **(kwargs or {}))


@dataclass
class Reference:
    """The original on one call: in its own dtype and in float64, and which tokens have a tie."""

    own: Any
    exact: Any
    tied: Tensor  # (T,): the k-th and the next key are the same value
    near: Tensor  # (T,): or nearer than the rounding of the keys
    sick: Tensor  # (T,): tokens with a NaN in their own values
    by_zero: bool  # whether the written form multiplies by zero what was not chosen

    @property
    def aside(self) -> Tensor:
        return self.tied | self.near


def in_float64(call: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in call)


def reference(p: Program, original: nn.Module, oracle: nn.Module, call: tuple[Tensor, ...]) -> Reference:
    tokens = call[0][..., 0].numel()
    with Choices(p) as rounded:
        own = run(original, (call, {}))
    with Choices(p) as exact:
        want = run(oracle, (in_float64(call), {}))
    tied, near = torch.zeros(tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.bool)
    for (mine, count), (true, _) in zip(rounded.made, exact.made, strict=True):
        if mine.numel() == 0 or mine.shape[:-1].numel() % tokens:
            continue
        tie, close = ties(mine, true, count, torch.finfo(getattr(torch, p.dtype)).eps)
        tied |= tie.reshape(tokens, -1).any(-1)
        near |= close.reshape(tokens, -1).any(-1)
    if p.outside and tied.logical_or(near).any():  # a token's place depends on the choices of the others
        near[:] = True
    return Reference(own, want, tied, near, call[0].isnan().any(-1).reshape(tokens), p.form in MULTIPLIES_BY_ZERO)


def ties(mine: Tensor, true: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor]:
    """(..., N) keys, rounded and in float64 -> where the last key taken and the first left are one, or too close."""
    top, at = true.topk(count + 1, dim=-1)
    last, following = top[..., count - 1], top[..., count]
    found = mine.topk(count + 1, dim=-1).values
    error = (mine.gather(-1, at) - top)[..., count - 1 :].abs().amax(-1)
    slack = 8 * error + 16 * eps * torch.maximum(last.abs(), following.abs())
    tie = found[..., count - 1] == found[..., count]
    # where one of the two is masked away by -inf the choice is plain; NaN keys choose nothing that could be compared
    plain = (following == -torch.inf) & torch.isfinite(last)
    return tie & ~plain, ~((last - following) > slack) & ~plain & ~true.isnan().any(-1)


def per_token(value: Tensor, tokens: int) -> Tensor:
    return value.detach().double().reshape(tokens, -1)


def distance(got: Tensor, want: Tensor, smallest: float) -> Tensor:
    """(T, H), (T, H) -> (T,) relative; infinite where only one of the two is finite, 0 where neither is."""
    far = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=smallest)
    sound, wanted = got.isfinite().all(-1), want.isfinite().all(-1)
    far = torch.where(sound & wanted, far, torch.inf)
    return torch.where(~sound & ~wanted, 0.0, far)


def complaints(got: Any, ref: Reference, *, set_aside: bool = True) -> list[str]:
    """What is wrong with an engine's outputs for one call; empty where the law holds.

    ``set_aside=False`` compares tied tokens too, for a twin that runs the original's own router.
    """
    found = []
    ours, own, exact = tensors(got), tensors(ref.own), tensors(ref.exact)
    if [(t.dtype, t.shape) for t in ours] != [(t.dtype, t.shape) for t in own]:
        return [f"outputs are {[(t.dtype, tuple(t.shape)) for t in ours]}, not {[(t.dtype, t.shape) for t in own]}"]
    tokens = ref.tied.numel()
    for number, (a, mine, true) in enumerate(zip(ours, own, exact, strict=True)):
        if not mine.is_floating_point():  # counts of the experts' tokens, the same wherever no choice is a tie
            if not ref.aside.any() and not torch.equal(a, mine):
                found.append(f"output {number}: integers differ in {int((a != mine).sum())} of {mine.numel()} values")
            continue
        if tokens == 0 or mine.numel() % tokens or mine.numel() == 0:
            continue
        smallest = SMALLEST[mine.dtype]
        a, mine, true = (per_token(t, tokens) for t in (a, mine, true))
        broken = ~mine.isfinite().all(-1)
        far, apart = distance(a, true, smallest), distance(mine, true, smallest)
        usual = apart[apart.isfinite()].median() if apart.isfinite().any() else torch.tensor(0.0)
        allowed = (OWN * torch.maximum(apart, usual)).clamp(min=FLOOR[own[number].dtype])
        # where the original breaks and float64 does too the engine must; where its dtype alone overflows it may, and
        # where a NaN came of a zero times what was not chosen, or of another token's NaN
        spread = mine.isnan().any(-1) & (ref.by_zero | ref.sick.any()) & ~ref.sick
        lost = broken & ~true.isfinite().all(-1) & ~spread
        bad = torch.where(broken, lost & a.isfinite().all(-1), ~(far <= allowed))
        if set_aside:
            bad &= ~ref.aside
        if bad.any():
            worst = int(torch.where(bad, far.nan_to_num(torch.inf), -1.0).argmax())
            found.append(
                f"output {number}: {int(bad.sum())} of {tokens} tokens are wrong; token {worst} is {far[worst]:.1e} "
                f"from float64, the original {apart[worst]:.1e}, allowed {allowed[worst]:.1e}"
                f"{'; the original is not finite there' if broken[worst] else ''}"
            )
    return found


def moved_ties(got: Any, ref: Reference) -> int:
    """How many tokens with exactly tied experts have other numbers than in the original.

    A token that overflowed in the original has no numbers that would show which experts it had.
    """
    tokens = ref.tied.numel()
    if not ref.tied.any():
        return 0
    moved = torch.zeros(tokens, dtype=torch.bool)
    for a, mine in zip(tensors(got), tensors(ref.own), strict=True):
        if mine.numel() and mine.numel() % tokens == 0 and mine.is_floating_point():
            smallest = SMALLEST[mine.dtype]
            a, dtype, mine = per_token(a, tokens), mine.dtype, per_token(mine, tokens)
            moved |= mine.isfinite().all(-1) & (distance(a, mine, smallest) > 10 * FLOOR[dtype])
    return int((moved & ref.tied).sum())
