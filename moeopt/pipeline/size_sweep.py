"""A verified rewrite on calls of every class of sizes that the block's Python tells apart.

A branch on a size is on no tape, and a number of tokens that no case has may take it. So the code is asked what it
does with sizes (:mod:`moeopt.control_flow.size_classes`); where it computes with them, original and rewritten code are
called with sizes of each class, and calls of a class that was not verified run the block's own code.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moeopt.capture.call_roles import of_sequence
from moeopt.capture.tree import ArgsKwargs
from moeopt.control_flow.branches_taken import call_places
from moeopt.control_flow.size_classes import SizeClasses, SizedCall
from moeopt.control_flow.size_values import SizeValues
from moeopt.ops.override import default_impl
from moeopt.options import Options
from moeopt.pipeline.block_capture import Capture, original_forward, statistics_kept
from moeopt.pipeline.size_limits import max_tokens
from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.install import RewrittenForward, bind
from moeopt.rewrite.known_sizes import KnownSizes, SizeUses
from moeopt.rewrite.live_codes import dequantized
from moeopt.value_types import PyObject
from moeopt.verification.block import verify_block
from moeopt.verification.cases import CaseBuilder
from moeopt.verification.few_tokens import unlike
from moeopt.verification.oracle import Restored
from moeopt.verification.results import BlockCheck, Case
from moeopt.verification.size_cases import most_tokens

_GRIDS = ((2, 7), (3, 11), (5, 6), (4, 13))
"""Token dims of the calls that are watched, the last two of them; where there is one, their product."""
_CALLS = {"strict": 400, "fast": 120}
_EXPERTS = 8192
"""That all calls together may ask for."""
_WEIGHTS = 4 * 10**9
"""That all calls together may read."""
_EACH = 3
"""Sizes of one class: of so many, it is seen what code computes with that only this class reaches."""
_TURNS = 4
"""In which code that only some sizes reach may show that it computes with sizes, too."""
_TWICE = 12
"""Such calls that are run on other values as well."""
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
    program.guard.sizes = None
    if options.verify == "off":
        return None
    sweep = _Sweep(capture, program, original, options)
    with (
        default_impl(), statistics_kept(capture.module),
        dequantized(capture.module, [bank for bank, _ in sweep.rewritten.banks]),
    ):  # fmt: skip
        try:
            failed = sweep.run()
        finally:
            call_places.cache_clear()  # some megabytes of what nothing asks for again
    if failed is None and sweep.known is not None and not sweep.known.complete():
        program.guard.sizes = sweep.known
    return failed


class _Ran:
    """The original, what its operands were in the last call, and whether it took that call."""

    def __init__(self, original: Callable[..., Any], module: nn.Module) -> None:
        self._original, self.module = original, module
        self.seen, self.done = SizeValues(), False

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        self.seen, self.done = SizeValues(), False
        out = self.seen.watching(self._original, *args, **kwargs)
        self.done = True
        return out


class _Sweep:
    """Calls of a block with sizes of each class, until they show no use of sizes that was not known.

    Attributes:
        rewritten: the block's new forward.
        known: the classes and those that were verified; None where its Python computes with no sizes.
    """

    def __init__(
        self, capture: Capture, program: BlockProgram, original: Callable[..., Any], options: Options
    ) -> None:  # fmt: skip
        self._capture, self._options, self._original, guard = capture, options, original, program.guard
        self.known: KnownSizes | None = None
        self.rewritten = RewrittenForward(capture.module, program, original_forward(capture.module))
        self.rewritten.silent = True
        self._experts = max(len(f.experts) for f in capture.found)
        self._ran = _Ran(original, capture.module)
        self._calls: list[SizedCall] = []
        tied = {at for at, _ in guard.tied}
        free = [(i, d) for i, shape in enumerate(guard.shapes) for d, fixed in enumerate(shape) if fixed is None]
        self._places = tuple(place for place in free if place not in tied)
        self._verified = [self._sizes((capture.call_spec.args, capture.call_spec.kwargs))]

    def run(self) -> BlockCheck | None:
        """The check of the first call that fails."""
        if not self._places:
            return None
        self._watch((_GRIDS[0], *_GRIDS))
        if len({call.sizes for call in self._calls}) < 3:  # code that takes few sizes: those of the recorded calls
            self._watch_calls(self._capture.calls)
        if not self._calls:  # it ran when it was recorded, and does not run watched
            exact = tuple(SizeUses(exact=True) for _ in range(len(self._places) + (len(self._places) > 1)))
            self.known = KnownSizes(self._places, exact, text="what could not be watched")
        elif (failed := self._in_turns()) is not None:
            return failed
        if self.known is not None:
            self.known.verified = {self.known.class_of(sizes) for sizes in self._verified}
        return None

    def _in_turns(self) -> BlockCheck | None:
        """The check of the first call that fails: classes are made anew for as long as calls of theirs show more."""
        if SizeClasses(self._calls).texts:  # or values of the data, which were the same in two calls
            self._watch((*_GRIDS, (1, 3), (1, 3)))
        uses: tuple[SizeUses, ...] = ()
        for turn in range(_TURNS):
            read = SizeClasses(self._calls)
            if read.uses == uses or not any(use.exact or use.limits or use.divisors for use in read.uses):
                break
            uses = read.uses if turn < _TURNS - 1 else tuple(SizeUses(exact=True) for _ in read.uses)
            self.known = KnownSizes(self._places, uses, text=", ".join(read.texts[:3]))
            if (failed := self._compare(self.known)) is not None:
                return failed
        return None

    def _compare(self, known: KnownSizes) -> BlockCheck | None:
        """The check of the first call of its classes that fails; what all others show is noted."""
        capture, options = self._capture, self._options
        most = most_tokens(max_tokens(capture.module, capture.found))
        weights = sum(p.numel() for p in capture.module.parameters())
        count = min(_CALLS[options.verify], max(_EXPERTS // self._experts, 16), max(_WEIGHTS // max(weights, 1), 16))
        first, news = {key for call in self._calls for key in call.seen.values}, list[tuple[int, ...]]()
        for grid in _Wanted(known, len(capture.call_spec.grid), most, count):
            case = self._case(grid, f"{'x'.join(map(str, grid))} tokens, which its code tells from others")
            for different in unlike(self._ran, self.rewritten, [case]):
                features = capture.found[-1].features
                check = verify_block(
                    capture.name, self._original, self.rewritten, [different], options.verify, features=features
                )
                if any(result.status == "failed" for result in check.cases):
                    check.reason = f"{check.reason}; its code computes with sizes of its input ({known.text})"
                    return check
            if self._ran.done:
                self._note((case.args, case.kwargs), self._ran.seen)
                self._verified.append(self._calls[-1].sizes[: len(self._places)])
                news += [grid] if not first.issuperset(self._ran.seen.values) else []
        for grid in news[:: max(len(news) // _TWICE, 1)]:  # what values decide there, equal sizes tell
            self._watch_calls([self._call(grid)])
        return None

    def _watch(self, grids: Iterable[tuple[int, int]]) -> None:
        rank = len(self._capture.call_spec.grid)
        for pair in grids:
            grid = (math.prod(pair),) if rank == 1 else (*[pair[0]] * (rank - 2), *pair)
            self._watch_calls([self._call(grid)])

    def _watch_calls(self, calls: Iterable[ArgsKwargs]) -> None:
        run = Restored(self._ran)
        for args, kwargs in calls:
            with contextlib.suppress(Exception):  # a size that the block does not take
                run(args, kwargs)
                self._note((args, kwargs), self._ran.seen)

    def _note(self, call: ArgsKwargs, seen: SizeValues) -> None:
        sizes = self._sizes(call)
        self._calls.append(SizedCall((*sizes, math.prod(sizes)) if len(sizes) > 1 else sizes, seen))

    def _call(self, grid: tuple[int, ...]) -> ArgsKwargs:
        case = self._case(grid, "")
        return case.args, case.kwargs

    def _case(self, grid: tuple[int, ...], name: str) -> Case:
        seed = self._options.seed + 23 + len(self._calls)
        build = CaseBuilder(self._capture.call_spec, self._experts, seed, None)
        case = build.case(name, grid, build.draw(math.prod(grid)), range(self._experts))
        return self._drawn_anew(case, torch.Generator().manual_seed(seed))

    def _drawn_anew(self, case: Case, generator: torch.Generator) -> Case:
        """With other numbers in arguments beside the tokens, which are the example's in every case: experts that a
        sample chooses by these would be as many in each call of one size."""
        flat, tree = pytree.tree_flatten((case.args, case.kwargs))
        for n, leaf in enumerate(self._capture.call_spec.leaves):
            if not of_sequence(leaf) or not isinstance(value := flat[n], torch.Tensor) or not len(value):
                continue
            flat[n] = value[torch.randint(len(value), (len(value),), generator=generator).to(value.device)]
            if value.is_floating_point() and value.isfinite().all():
                flat[n] = flat[n] + torch.randn(value.shape, generator=generator).to(value) * value.abs().mean()
        args, kwargs = pytree.tree_unflatten(flat, tree)
        return Case(case.name, args, kwargs)

    def _sizes(self, call: ArgsKwargs) -> tuple[int, ...]:
        tensors = bind(self._capture.signature, *call).tensors()
        return tuple(tensors[i].shape[d] for i, d in self._places)


class _Wanted:
    """Token dims of the calls to be made: those that are cheap first, of each class one, then of each another.

    Args:
        rank: how many token dims there are.
        most: tokens of a call.
        count: of calls.
    """

    def __init__(self, known: KnownSizes, rank: int, most: int, count: int) -> None:
        self._known, self._rank, self._most, self._count = known, rank, most, count

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        made, tokens = defaultdict[Any, list[tuple[int, ...]]](list), 0
        for turn, grid in itertools.product(range(_EACH), [*self._grids()]):
            count = math.prod(grid)
            sizes = grid if len(self._known.places) == self._rank else (count,)
            key = self._known.class_of(sizes) if len(self._known.places) in (1, self._rank) else grid
            if len(made[key]) > turn or grid in made[key] or count > self._most:
                continue
            if tokens + count > min(_TOKENS, 2 * self._most):
                continue
            made[key].append(grid)
            tokens += count
            yield grid
            if sum(map(len, made.values())) >= self._count:
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
        turns = _EACH * (min(math.lcm(*use.divisors), _PAST) if use.divisors else 1)
        for start in whole if not use.exact else ():
            found |= {start + 1 + step for step in range(turns)}
        found |= {(a + b) // 2 for a, b in itertools.pairwise(whole)}
        found |= {*range(1, _PAST)} if use.exact else set()
    return sorted(n for n in found if n > 0)
