"""Adversarial routing: the calls on which a wrong rewrite shows.

From one prototype call, rows are drawn out of a pool (the prototype's own rows, gaussian rows at their
scale, rows given because they reach a certain expert) and arranged. Where the block routes by itself,
an arrangement can only ask (equal rows go to one expert); where expert ids are arguments, it decides.

    case                    what it is there to catch
    every expert            a wrong expert anywhere; a count the capture never saw
    one token               squeezed dims, decode shapes
    one expert              a group with all rows, E - 1 groups with none
    few experts, ragged     empty experts, odd shapes, duplicated tokens
    exact ties              zero rows: all scores equal, all outputs the bias
    extreme magnitudes      clamps, epsilons, overflow
    nan and inf rows        leaks from one token into others
    a nan row alone         experts that run for no other token
    many tokens             a capacity, a window or a branch that no smaller case reaches
    argument N turned       a mask or mark that does nothing at the values given: all ones, no padding
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor

from moeopt.capture.call_roles import CallSpec
from moeopt.verification.results import Case

MAX_TOKENS = 1024
"""Of the case that reaches every expert; it asks for 4 tokens per expert and slot below that."""

MANY, FEWEST = 521, 128
"""Tokens of the case of many, which is left out where a large block can only afford fewer than the second."""


def adversarial_cases(
    call_spec: CallSpec,
    num_experts: int,
    *,
    level: Literal["strict", "fast", "off"] = "strict",
    seed: int = 0,
    router_rows: Tensor | None = None,
    max_tokens: int = MANY,
    half: bool = False,
) -> list[Case]:
    """Cases for a block of ``num_experts`` experts (1 for a dense FFN).

    Args:
        call_spec: a real call and the roles of its arguments.
        level: "strict" gives all of the table above, "fast" the first three, "off" none.
        router_rows: (R, H) rows likely to reach each expert, put into "every expert".
        max_tokens: that the case of many may have; below ``FEWEST`` it is left out.
        half: whether the block has weights of float16, whose range holds no large rows of float32.
    """
    if level == "off":
        return []
    build = CaseBuilder(call_spec, num_experts, seed, router_rows)
    chosen = [build.every_expert(), build.one_token(), build.one_expert(), *build.turned()]
    if level == "strict":
        chosen += [build.few_experts(), build.exact_ties(), build.extreme_magnitudes(half), build.non_finite()]
        chosen.append(build.nan_alone())
        if min(max_tokens, MANY) >= FEWEST:
            chosen.append(build.many_tokens(min(max_tokens, MANY)))
    return chosen


class CaseBuilder:
    def __init__(self, call_spec: CallSpec, num_experts: int, seed: int, router_rows: Tensor | None) -> None:
        self.call_spec = call_spec
        self.experts = max(num_experts, 1)
        self.router_rows = router_rows
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = call_spec.indices("tokens")

    def every_expert(self) -> Case:
        slots = min((self.call_spec.slots(n) for n in self.call_spec.routed()), default=1)
        aimed = 0 if self.router_rows is None else len(self.router_rows)
        count = aimed + 16 if aimed else math.ceil(4 * self.experts / (slots if self.call_spec.routed() else 2))
        count = max(min(count, MAX_TOKENS), 64)
        rows = self.draw(count + count % 2)
        for n in self.tokens if aimed else []:
            given = self.router_rows
            assert given is not None
            if given.shape[-1] == rows[n].shape[-1] and rows[n].dim() == 2:
                rows[n][: min(aimed, len(rows[n]))] = given[: len(rows[n])].to(rows[n])
        self.shuffle(rows)
        return self.case("every expert", self.batched(count + count % 2), rows, range(self.experts))

    def one_token(self) -> Case:
        return self.case("one token", (1,) * len(self.call_spec.grid), self.draw(1), range(self.experts))

    def one_expert(self) -> Case:
        rows = self.draw(7)
        for n in self.tokens:
            rows[n] = rows[n][:1].expand_as(rows[n]).clone()
        return self.case("one expert", self.flat(7), rows, [self.pick(1)[0]], same=True)

    def few_experts(self) -> Case:
        count = 15 if len(self.call_spec.grid) > 1 else 5
        rows = self.draw(count)
        for n in self.tokens:
            rows[n][-2:] = rows[n][:2]
        grid = (1,) * (len(self.call_spec.grid) - 2) + (3, 5) if len(self.call_spec.grid) > 1 else (5,)
        return self.case("few experts, ragged", grid, rows, self.pick(2))

    def exact_ties(self) -> Case:
        rows = self.draw(6)
        for n in self.tokens:
            rows[n][[0, 3, 4]] = 0
        return self.case("exact ties", self.flat(6), rows, range(self.experts))

    def extreme_magnitudes(self, half: bool = False) -> Case:
        rows = self.draw(10)
        for n in self.tokens:
            large = 1e3 if rows[n].dtype in (torch.float32, torch.float64) and not half else 64.0
            rows[n][:5] *= large
            rows[n][5:] /= large
        return self.case("extreme magnitudes", self.flat(10), rows, range(self.experts))

    def non_finite(self) -> Case:
        rows = self.draw(9)
        for n in self.tokens:
            rows[n][2], rows[n][6] = math.nan, math.inf
        return self.case("nan and inf rows", self.flat(9), rows, range(self.experts))

    def nan_alone(self) -> Case:
        """A dispatch that asks ``weights > 0`` runs no expert for it, and beside other tokens it may."""
        rows = self.draw(1)
        for n in self.tokens:
            rows[n][:] = math.nan
        return self.case("a nan row alone", (1,) * len(self.call_spec.grid), rows, range(self.experts))

    def many_tokens(self, count: int, grid: tuple[int, ...] | None = None) -> Case:
        """Half of the tokens are one and the same, so that its experts get them all; the others are drawn."""
        rows = self.draw(count)
        alike = torch.randperm(count, generator=self.generator) < count // 2
        for n in self.tokens:
            here = alike.to(rows[n].device)
            rows[n][here] = rows[n][:1].clone()
        return self.case("many tokens", grid or self.flat(count), rows, range(self.experts), alike=alike)

    def turned(self) -> list[Case]:
        """The given call, with other values in one of the arguments that may switch something on or off."""
        cases = []
        for n, leaf in enumerate(self.call_spec.leaves):
            if leaf.role in ("static", "weights", "pairs"):
                call = self.call_spec.replaced(n, lambda own: _turned(own, self.generator))
                if call is not None:
                    cases.append(Case(f"argument {n} turned", *call))
        return cases

    def draw(self, count: int) -> dict[int, Tensor]:
        """``count`` rows of each leaf: half the prototype's (in one order for all leaves), half new ones."""
        source = int(torch.randint(1 << 30, (), generator=self.generator))
        rows: dict[int, Tensor] = {}
        for n, leaf in enumerate(self.call_spec.leaves):
            if not leaf.lead:
                continue
            own = self.call_spec.rows(n)
            generator = torch.Generator().manual_seed(source)
            order = torch.randint(max(len(own), 1), (count,), generator=generator).to(own.device)
            new = own[order].clone()
            if leaf.role == "tokens" and count > 1:
                half = torch.arange(count, device=own.device) % 2 == 1
                new[half] = self.gaussian(own, int(half.sum()))
            elif leaf.role == "weights":
                factor = 0.5 + torch.rand(new.shape, generator=self.generator)
                new = new * factor.to(new)
            rows[n] = new
        return rows

    def gaussian(self, like: Tensor, count: int) -> Tensor:
        finite = like[like.isfinite()].float()
        scale = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
        noise = torch.randn((count, *like.shape[1:]), generator=self.generator)
        return (noise * (scale or 1.0)).to(like)

    def shuffle(self, rows: dict[int, Tensor]) -> None:
        count = len(next(iter(rows.values())))
        order = torch.randperm(count, generator=self.generator)
        for n in rows:
            rows[n] = rows[n][order.to(rows[n].device)]

    def pick(self, count: int) -> list[int]:
        return torch.randperm(self.experts, generator=self.generator)[:count].tolist()

    def ids(self, slots: int, count: int, experts: list[int], same: bool) -> Tensor:
        """(count, K) ids, distinct in a row where there are enough experts, covering ``experts`` first."""
        others = [e for e in self.pick(self.experts) if e not in experts]
        order = (experts + others) if len(experts) < slots else experts
        width = slots if len(experts) < slots else len(order)
        start = torch.zeros(count, dtype=torch.long) if same else torch.arange(count) * slots
        ids = (start[:, None] + torch.arange(slots)[None]) % max(width, 1)
        return torch.tensor(order)[ids % len(order)]

    def case(
        self,
        name: str,
        grid: tuple[int, ...],
        rows: dict[int, Tensor],
        experts: range | list[int],
        same: bool = False,
        alike: Tensor | None = None,
    ) -> Case:
        for n in self.call_spec.routed():
            order = self.pick(self.experts) if isinstance(experts, range) else list(experts)
            dropped = rows[n].flatten(1).any(1) if self.call_spec.leaves[n].role == "choices" else None
            ids = self.ids(self.call_spec.slots(n), len(rows[n]), order, same)
            if alike is not None:
                ids[alike] = ids[:1].clone()
            rows[n] = self.call_spec.naming(n, ids)
            if dropped is not None:  # a token that the given mask drops stays dropped
                rows[n][~dropped] = 0
        args, kwargs = self.call_spec.with_tokens(grid, rows)
        return Case(name, args, kwargs)

    def flat(self, count: int) -> tuple[int, ...]:
        return (1,) * (len(self.call_spec.grid) - 1) + (count,)

    def batched(self, count: int) -> tuple[int, ...]:
        if len(self.call_spec.grid) == 1:
            return (count,)
        return (2,) + (1,) * (len(self.call_spec.grid) - 2) + (count // 2,)


def _turned(original: Tensor, generator: Generator) -> Tensor | None:
    """Flags of both values, integers with zeros among them, floats with zeros among them; None for anything else."""
    if original.dim() == 0 or original.numel() < 2 or original.is_complex():
        return None
    other = torch.rand(original.shape, generator=generator).to(original.device) < 0.4
    if original.dtype == torch.bool:
        return original ^ other
    if not original.is_floating_point() and bool(((original == 0) | (original == 1)).all()):
        return torch.where(other, 1 - original, original)
    return torch.where(other, torch.zeros_like(original), original)
