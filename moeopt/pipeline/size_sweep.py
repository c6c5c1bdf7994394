"""A verified rewrite on calls of every class of sizes that the block's Python tells apart.

A branch on a size is on no tape, and a number of tokens that no case has may take it. So the code is asked what it does
with sizes (:mod:`moeopt.pipeline.size_classes`); where it computes with them, original and rewritten are called with
sizes of each class, and calls of a class that was not verified run the block's own code.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.ops.override import default_impl
from moeopt.options import Options
from moeopt.pipeline.block_capture import Capture, original_forward, statistics_kept
from moeopt.pipeline.size_classes import SizeClasses, SizedCall
from moeopt.pipeline.size_limits import max_tokens
from moeopt.pipeline.size_values import SizeValues
from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.install import RewrittenForward, bind
from moeopt.rewrite.known_sizes import KnownSizes, SizeUses
from moeopt.rewrite.live_codes import dequantized
from moeopt.value_types import PyObject
from moeopt.verification.block import verify_block
from moeopt.verification.cases import CaseBuilder
from moeopt.verification.few_tokens import unlike
from moeopt.verification.oracle import Restored
from moeopt.verification.results import BlockCheck
from moeopt.verification.size_cases import most_tokens

_GRIDS = ((2, 7), (3, 11), (5, 6), (4, 13))
"""Token dims of the calls that are watched, the last two of them; where there is one, their product."""
_CALLS = {"strict": 400, "fast": 120}
_EXPERTS = 8192
"""That all calls together may ask for."""
_TOKENS = 40_000
"""Of all these calls together, in a block whose cases may have as many as are asked for."""
_USUAL = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
_PAST = 70
"""Sizes past a limit that are tried, for their remainders."""


def check_sizes(
    capture: Capture, program: BlockProgram, original: Callable[..., Any], options: Options
) -> BlockCheck | None:
    """The check of the first call on which ``program`` is another function than ``original``; None without one, and the
    guard of ``program`` then knows for which sizes it holds."""
    if options.verify == "off":
        return None
    guard, spec = program.guard, capture.call_spec
    known, guard.sizes = _known_sizes(capture, program, original, options.seed), None
    if known is None:
        return None
    known.verified.add(known.class_of(_sizes(capture, known.places, (spec.args, spec.kwargs))))
    experts = max(len(f.experts) for f in capture.found)
    build = CaseBuilder(spec, experts, options.seed + 17, None)
    rewritten = RewrittenForward(capture.module, program, original_forward(capture.module))
    rewritten.silent = True
    ran = _Ran(original, capture.module)
    most = most_tokens(max_tokens(capture.module, capture.found))
    count = min(_CALLS[options.verify], max(_EXPERTS // experts, 16))
    reached = _Wanted(known, len(spec.grid), most, count)
    with default_impl(), statistics_kept(capture.module), dequantized(capture.module, [b for b, _ in rewritten.banks]):
        for grid in reached:
            name, rows = "x".join(map(str, grid)), build.draw(math.prod(grid))
            case = build.case(f"{name} tokens, which its code tells from others", grid, rows, range(experts))
            ran.done = False
            for different in unlike(ran, rewritten, [case]):
                check = verify_block(
                    capture.name, original, rewritten, [different], options.verify, features=capture.found[-1].features
                )
                if any(result.status == "failed" for result in check.cases):
                    check.reason = f"{check.reason}; its code computes with sizes of its input ({known.text})"
                    return check
            if ran.done:
                known.verified.add(known.class_of(_sizes(capture, known.places, (case.args, case.kwargs))))
    guard.sizes = None if known.complete() else known
    return None


class _Ran:
    """The original, and whether it took the last call."""

    def __init__(self, original: Callable[..., Any], module: nn.Module) -> None:
        self._original, self.module, self.done = original, module, False

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        out = self._original(*args, **kwargs)
        self.done = True
        return out


def _known_sizes(
    capture: Capture, program: BlockProgram, original: Callable[..., Any], seed: int
) -> KnownSizes | None:  # fmt: skip
    """What the block's Python does with its sizes, with no class verified; None where it computes with none."""
    guard = program.guard
    tied = {at for at, _ in guard.tied}
    free = [(i, d) for i, shape in enumerate(guard.shapes) for d, fixed in enumerate(shape) if fixed is None]
    places = tuple(place for place in free if place not in tied)
    calls = [*_watched(capture, original, places, (_GRIDS[0], *_GRIDS), seed)]
    if not places or len({call.sizes for call in calls}) < 2:
        return None
    if SizeClasses(calls).texts:  # or values of the data, which were the same in two calls
        calls += _watched(capture, original, places, (*_GRIDS, (1, 3), (1, 3)), seed + len(calls))
    read = SizeClasses(calls)
    if any(use.exact or use.limits or use.divisors for use in read.uses):
        return KnownSizes(places, read.uses, text=", ".join(read.texts[:3]))
    return None


def _watched(
    capture: Capture, original: Callable[..., Any], places: Sequence[tuple[int, int]],
    grids: Iterable[tuple[int, int]], seed: int,
) -> Iterator[SizedCall]:  # fmt: skip
    spec, run = capture.call_spec, Restored(original)
    experts = max(len(f.experts) for f in capture.found)
    for number, pair in enumerate(grids):
        rank = len(spec.grid)
        grid = (math.prod(pair),) if rank == 1 else (*[pair[0]] * (rank - 2), *pair)
        build = CaseBuilder(spec, experts, seed + 23 + number, None)
        case = build.case("", grid, build.draw(math.prod(grid)), range(experts))
        seen = SizeValues()
        with contextlib.suppress(Exception):  # a size that the block does not take
            seen.watching(run, case.args, case.kwargs)
            sizes = _sizes(capture, places, (case.args, case.kwargs))
            yield SizedCall((*sizes, math.prod(sizes)) if len(sizes) > 1 else sizes, seen)


def _sizes(capture: Capture, places: Sequence[tuple[int, int]], call: ArgsKwargs) -> tuple[int, ...]:
    tensors = bind(capture.signature, *call).tensors()
    return tuple(tensors[i].shape[d] for i, d in places)


class _Wanted:
    """Token dims of the calls to be made: those that are cheap first, and of each class one.

    Args:
        rank: how many token dims there are.
        most: tokens of a call.
        count: of calls.
    """

    def __init__(self, known: KnownSizes, rank: int, most: int, count: int) -> None:
        self._known, self._rank, self._most, self._count = known, rank, most, count

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        tried, tokens = set[Any](), 0
        for grid in self._grids():
            count = math.prod(grid)
            sizes = grid if len(self._known.places) == self._rank else (count,)
            key = self._known.class_of(sizes) if len(self._known.places) in (1, self._rank) else grid
            if key in tried or count > self._most or tokens + count > min(_TOKENS, 2 * self._most):
                continue
            tried.add(key)
            tokens += count
            yield grid
            if len(tried) >= self._count:
                return

    def _grids(self) -> Iterable[tuple[int, ...]]:
        *own, whole = self._known.uses if len(self._known.uses) > 1 else (self._known.uses[0],) * 2
        if self._rank == 1:
            return [(n,) for n in _asked([whole])]
        firsts, lasts = _asked(own[:1]), _asked(own[-1:])
        ones = (1,) * (self._rank - 2)
        alone = [(*ones, 1, n) for n in _asked([whole, own[-1]])] + [(*ones, n, 1) for n in _asked([whole, own[0]])]
        pairs = sorted(itertools.product(firsts[:64], lasts[:128]), key=math.prod)
        return [*sorted(alone, key=math.prod), *((*ones, *pair) for pair in pairs)]


def _asked(uses: Iterable[SizeUses]) -> list[int]:
    """Sizes in question: at each limit and beside it, between limits and past them, with all remainders."""
    found = {*_USUAL}
    for use in uses:
        for limit in use.limits:
            found |= {math.floor(limit), math.floor(limit) + 1}
        whole = [0, *(math.floor(limit) for limit in use.limits)]
        turns = min(math.lcm(*use.divisors), _PAST) if use.divisors else 1
        for start in whole if not use.exact else ():
            found |= {start + 1 + step for step in range(turns)}
        found |= {(a + b) // 2 for a, b in itertools.pairwise(whole)}
        found |= {*range(1, _PAST)} if use.exact else set()
    return sorted(n for n in found if n > 0)
