"""Rows that travel between ranks, and their gradients that travel back.

Backward exchanges meet first, as forward ones do: an autograd engine that came to another block is an error, no sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.distributed.channel import Channel
from moeopt.distributed.own_experts import OwnExperts
from moeopt.value_types import PyObject

Splits = tuple[list[int], list[int]]
"""Rows to each rank, rows from each rank."""


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: PyObject, plan: Transfer, phase: str, back: bool, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.phase, ctx.back = plan, phase, back
        return tuple(plan.move(phase, back, parts))

    @staticmethod
    def backward(ctx: PyObject, *grads: Tensor) -> tuple[PyObject, ...]:
        plan = ctx.plan
        phase = f"the gradients of {ctx.phase}"
        plan.meet_again(phase, grads[0].device)
        return None, None, None, *plan.move(phase, not ctx.back, grads)


class _Gathered(torch.autograd.Function):
    """Every rank gets every rank's rows. The ranks have one loss between them: each takes its own rows' gradient."""

    @staticmethod
    def forward(ctx: PyObject, plan: Transfer, phase: str, rows: Tensor) -> Tensor:
        channel, (_, of) = plan.channel, plan.splits
        ctx.first, ctx.count = sum(of[: channel.rank]), of[channel.rank]
        return channel.send(phase, rows.repeat(channel.size, 1), [len(rows)] * channel.size, of)

    @staticmethod
    def backward(ctx: PyObject, *grads: Tensor) -> tuple[PyObject, ...]:
        return None, None, grads[0][ctx.first : ctx.first + ctx.count]


class _Summed(torch.autograd.Function):
    """The sum over ranks that have one loss between them: each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: PyObject, channel: Channel, phase: str, part: Tensor) -> Tensor:
        return channel.add(phase, part)

    @staticmethod
    def backward(ctx: PyObject, *grads: Tensor) -> tuple[PyObject, ...]:
        return None, None, grads[0]


class _Shared(torch.autograd.Function):
    """What every rank has alike; the gradients of the ranks' parts are added."""

    @staticmethod
    def forward(ctx: PyObject, plan: Transfer, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: PyObject, *grads: Tensor) -> tuple[PyObject, ...]:
        ctx.plan.meet_again("adding the gradients of its tokens", grads[0].device)
        return None, *(ctx.plan.channel.add("adding the gradients of its tokens", grad) for grad in grads)


class Transfer:
    """One call of one block: who sends how many rows to whom, agreed with the others.

    Args:
        facts: of the meeting, see ``channel.FACTS``: block, step, dtypes, width, experts per token, gradients.
        counts_P: rows for each rank.
        grad: whether gradients flow; on every rank alike.
        experts: of the op, which the ranks must still have each their own of.

    Raises:
        UsageError: different experts have become the same.
    """

    def __init__(
        self, channel: Channel, phase: str, counts_P: Tensor, facts: list[int], grad: bool,
        experts: OwnExperts | None = None,
    ) -> None:  # fmt: skip
        self.channel, self.facts, self.grad, self.block = channel, facts, grad, channel.block
        to, of, digests = channel.meet(phase, counts_P, facts, None if experts is None else experts.now())
        self.splits: Splits = to, of
        if experts is not None:
            experts.check(digests, self.block, channel.ranks)

    def meet_again(self, phase: str, device: torch.device) -> None:
        """Before gradients are sent."""
        self.channel.block = self.block
        zero_P = torch.zeros(self.channel.size, dtype=torch.int64, device=device)
        self.channel.meet(phase, zero_P, [self.facts[0], -self.facts[1], *self.facts[2:]])

    def move(self, phase: str, back: bool, parts: tuple[Tensor, ...]) -> list[Tensor]:
        """Without gradients; the first part has the tokens' rows, others describe them."""
        to, of = reversed(self.splits) if back else self.splits
        return [self.channel.send(phase, part, to, of, described=n > 0) for n, part in enumerate(parts)]

    def send(self, phase: str, *parts: Tensor, back: bool = False) -> tuple[Tensor, ...]:
        """Rows to their ranks; ``back``: to where they came from."""
        if not self.grad:
            return tuple(self.move(phase, back, parts))
        moved: tuple[Tensor, ...] = _Sent.apply(self, phase, back, *map(_leaf, parts))  # type: ignore[no-untyped-call]
        return moved

    def gather(self, phase: str, rows: Tensor) -> Tensor:
        """The rows of all ranks, on each of them."""
        gathered: Tensor = _Gathered.apply(self, phase, _leaf(rows) if self.grad else rows)  # type: ignore[no-untyped-call]
        return gathered

    def add(self, phase: str, part: Tensor) -> Tensor:
        """The sum over the ranks, on each of them."""
        summed: Tensor = _Summed.apply(self.channel, phase, _leaf(part) if self.grad else part)  # type: ignore[no-untyped-call]
        return summed

    def share(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Parts that every rank has alike, before each rank takes its share of them."""
        if not self.grad:
            return parts
        shared: tuple[Tensor, ...] = _Shared.apply(self, *map(_leaf, parts))  # type: ignore[no-untyped-call]
        return shared


def _leaf(part: Tensor) -> Tensor:
    """``part`` so that its gradient is asked for: the exchange of gradients needs every rank, also one without any."""
    return part if part.requires_grad or not part.is_floating_point() else part.detach().requires_grad_()
