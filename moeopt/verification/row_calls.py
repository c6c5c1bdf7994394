"""Calls of one block on rows of a caller's choice, in each of its three forms.

Shape legend: R rows, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.call_roles import CallSpec
from moeopt.capture.tree import ArgsKwargs
from moeopt.rewrite.whole_model import tried
from moeopt.verification.model import run_plain
from moeopt.verification.steering import ORDINARY, SteeredRows
from moeopt.verification.ties import choices_of

SHAKE = 2.0
"""Eps: a product of two rows rounds each term and each sum."""
MOST = 128
"""Rows that one call may have."""

RuntimeRun = Callable[..., tuple[Any, dict[str, Tensor]]]
"""A block on a runtime: ``(outputs, expert ids (T, K) by site)``."""


@dataclass
class Unpinned:
    """One block in its three forms: the original's code, rewritten in PyTorch, and on the runtime.

    ``call_spec`` is a real call of it; ``experts`` how many it has.
    """

    name: str
    original: Callable[..., Any]
    rewritten: nn.Module
    run: RuntimeRun
    call_spec: CallSpec
    experts: int


class RowCalls:
    """Calls of one block with other rows: all rows in one, or as many as its own call has where it takes no other.

    Attributes:
        ordinary: (R, H), gaussian at the scale of the call's own rows.
    """

    def __init__(self, block: Unpinned, leaf: int, seed: int) -> None:
        self.block, self.call_spec, self.leaf = block, block.call_spec, leaf
        self.generator = torch.Generator().manual_seed(seed)
        self.free = True
        self.ordinary = self._drawn(ORDINARY)
        if not all(self._held(count) for count in (ORDINARY, MOST)):
            self.free = False
            self.ordinary = self._drawn(math.prod(self.call_spec.grid))

    def probe(self, rows: Tensor) -> list[Tensor]:
        """What the block's choices of experts compare, on these rows."""
        args, kwargs = self.call(rows)
        choices = choices_of(self.block.rewritten, args, kwargs)[1]
        return [event.scores for choice in choices for event in choice.events if event.scores is not None]

    def call(self, rows: Tensor) -> ArgsKwargs:
        grid = (1,) * (len(self.call_spec.grid) - 1) + (len(rows),) if self.free else self.call_spec.grid
        return self.call_spec.with_tokens(grid, {self.leaf: rows})

    def shaken(self, rows: Tensor, draw: int, zeros: bool = False) -> ArgsKwargs:
        """The call on rows that are moved by ``SHAKE`` eps; with ``zeros``, rows of zeros by as much of the others."""
        generator = torch.Generator().manual_seed(draw)
        noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows.device)
        scale = self.ordinary.double().square().mean().sqrt()
        wide = rows.double()
        size = torch.where((rows == 0).all(-1, keepdim=True) & zeros, scale, wide)
        return self.call((wide + SHAKE * torch.finfo(rows.dtype).eps * noise * size).to(rows.dtype))

    def parts(self, rows: SteeredRows) -> Iterator[SteeredRows]:
        """``rows`` in as many calls as they take; the last one is filled with ordinary rows."""
        size = len(rows.values) if self.free else len(self.ordinary)
        for start in range(0, len(rows.values), size):
            values, kinds = rows.values[start : start + size], rows.kinds[start : start + size]
            more = size - len(values)
            yield SteeredRows(
                rows.name, torch.cat([values, self.ordinary[:more]]), [*kinds, *["an ordinary row"] * more]
            )

    def _drawn(self, count: int) -> Tensor:
        own = self.call_spec.rows(self.leaf)
        finite = own[own.isfinite()].float()
        scale = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
        return (torch.randn(count, own.shape[1], generator=self.generator) * (scale or 1.0)).to(own)

    def _held(self, count: int) -> bool:
        """Whether all three forms of the block take a call of ``count`` rows."""
        args, kwargs = self.call(self._drawn(count))
        with tried(self.block.rewritten) as refused:
            try:
                run_plain(self.block.original, args, kwargs)
                choices_of(self.block.rewritten, args, kwargs)
                self.block.run(*args, **kwargs)
            except Exception:  # sizes that one of them was not made for
                return False
            return not refused()
