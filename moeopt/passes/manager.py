"""Runs passes over a block and keeps the law: copy, apply, check, verify; revert by name what fails; record always.

The block is verified once, with everything that fired. Only where that fails is it verified again pass by pass: the
first pass with which it fails is reverted and named, and the others are applied again without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moeopt.errors import Declined, UsageError
from moeopt.passes.base import Level, Pass, PassRecord
from moeopt.rewrite.block_graph import BlockGraph
from moeopt.rewrite.check import LawBroken, check_block
from moeopt.rewrite.text import text


class Verdict(Protocol):
    """What verifying a block gives; ``passed`` is None where nothing was verified."""

    passed: bool | None
    reason: str


VerifyBlock = Callable[[BlockGraph, bool], Verdict]
"""Judges a block; True allows to give up a lowering that fails, which must not be done for a wrong pass."""
Differ = Callable[[BlockGraph, BlockGraph], str]
"""How two blocks differ in bits on a real call, in words; "" where they do not."""


@dataclass
class Result:
    """What became of one block.

    Args:
        block: what runs.
        verdict: of that block.
        records: of each pass, in order.
        graphs: where asked for, by file name, the text of the block before and after each pass that fired.
    """

    block: BlockGraph
    verdict: Verdict
    records: list[PassRecord]
    graphs: dict[str, str] = field(default_factory=dict)


@dataclass
class _Fired:
    """A pass that fired: its place among the records, the block after it, and its graphs as text where asked for."""

    record: int
    after: BlockGraph
    graphs: dict[str, str]


@dataclass
class PassManager:
    """Applies ``passes`` in order.

    Args:
        skip, only: names of passes that are left out, and of the only ones that run.
        fuel: how many applications that fired are kept at most, over all blocks; None means any number.
        engine: whether an engine, not PyTorch, will run the blocks.
        graphs: whether each block's text before and after each pass is wanted.

    Raises:
        UsageError: ``skip`` or ``only`` name a pass that ``passes`` has not.
    """

    passes: Sequence[Pass]
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    fuel: int | None = None
    engine: bool = False
    graphs: bool = False
    spent: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_names(self.skip, self.passes, "skip_passes")
        check_names(self.only, self.passes, "only_passes")

    def run(self, block: BlockGraph, verify: VerifyBlock, differ: Differ | None = None) -> Result:
        """Apply every pass to a copy of ``block``.

        Args:
            verify: judges the block as it will run.
            differ: proves that an exact pass is exact.

        Returns:
            the block with every pass that stood. Where it fails with the first pass that fired alone, the verdict
            says so and nothing of it may be used.

        Raises:
            Declined: no pass made a graph of the block, with the reason of the pass that could have. Any other error
                of that pass comes through as well.
        """
        records, fired = self._apply(block, 0, {}, differ)
        last = fired[-1].after if fired else block
        del block  # with what was recorded of its own code, which takes memory that verification needs
        reverted: dict[str, str] = {}
        while True:
            if last.captured is not None:
                raise Declined(next((r.reason for r in records if r.reason), "no pass makes a graph of it"))
            guilty, verdict = _judge(last, fired, verify)
            if guilty is None:
                for one in fired:
                    records[one.record] = dataclasses.replace(records[one.record], verified=verdict.passed is True)
                graphs = {name: words for one in fired for name, words in one.graphs.items()}
                return Result(last, verdict, records, graphs=graphs)
            at = fired[guilty].record
            if guilty == 0:
                return Result(last, verdict, records)
            reverted[records[at].name] = f"reverted: the block is not equivalent with it: {verdict.reason}"
            before = fired[guilty - 1].after
            more, more_fired = self._apply(before, at, reverted, differ, guilty)
            records, fired = records[:at] + more, fired[:guilty] + more_fired
            last = fired[-1].after

    def stands(self, result: Result) -> None:
        """Note that ``result`` was installed: its applications are spent."""
        self.spent += sum(r.fired > 0 for r in result.records)

    @property
    def exhausted(self) -> bool:
        """Whether no further application would be kept."""
        return self.fuel is not None and self.spent >= self.fuel

    def leaves_out(self, name: str) -> str:
        """Why the pass of this name does not run at all, a sentence; "" where it does."""
        one = next((p for p in self.passes if p.name == name), None)
        return f"the pass {name} is not among the passes of this run" if one is None else self._left_out(one)

    def _apply(
        self, block: BlockGraph, first: int, reverted: dict[str, str], differ: Differ | None, fired_before: int = 0
    ) -> tuple[list[PassRecord], list[_Fired]]:
        """Every pass from number ``first`` on."""
        records: list[PassRecord] = []
        fired: list[_Fired] = []
        for one in self.passes[first:]:
            counts, started = block.counts(), time.perf_counter()
            reason = self._left_out(one) or reverted.get(one.name, "") or self._out_of_fuel(fired_before + len(fired))
            times, after = 0, block
            if not reason:
                after = block.copy()
                try:
                    times = one.apply(after)
                    if times:
                        _keep_the_law(one, block, after, differ)
                except UsageError:
                    raise  # what the user gave is no pass's fault
                except Exception as err:
                    if block.captured is not None:
                        raise  # without its first graph a block stays the user's own code
                    times, reason = 0, _why_not(err)
            seconds = time.perf_counter() - started
            record = PassRecord(one.name, one.level, block.name, times, reason, seconds, counts, counts)
            if times:
                record = dataclasses.replace(record, after=after.counts())
                graphs = self._texts(f"{fired_before + len(fired) + 1}-{one.name}", block, after)
                fired.append(_Fired(first + len(records), after, graphs))
                block = after
            records.append(record)
        return records, fired

    def _texts(self, name: str, before: BlockGraph, after: BlockGraph) -> dict[str, str]:
        return {f"{name}.before.graph": text(before), f"{name}.after.graph": text(after)} if self.graphs else {}

    def _left_out(self, one: Pass) -> str:
        if self.only and one.name not in self.only:
            return f"skipped: only_passes names {', '.join(self.only)}"
        if one.name in self.skip:
            return "skipped: skip_passes names it"
        if one.name not in self.only and (why := _off(one)):
            return f"off: {why}"
        if not self.engine and (why := getattr(one, "engines_only", "")):
            return f"for engines only: {why}"
        return ""

    def _out_of_fuel(self, fired: int) -> str:
        if self.fuel is None or self.spent + fired < self.fuel:
            return ""
        return f"MOEOPT_FUEL={self.fuel}: no more passes are applied"


def check_names(names: Iterable[str], passes: Sequence[Pass], option: str) -> None:
    """Raise a ``UsageError`` for a name that no pass has."""
    known = list(dict.fromkeys(p.name for p in passes))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]!r}? " if close else ""
            variable = "" if option == "only_passes" else f" (or MOEOPT_{option.upper()})"
            raise UsageError(
                f"{option}{variable} names {name!r}, which is no pass: {meant}the passes are {', '.join(known)}"
            )


def _off(one: Pass) -> str:
    """Why ``one`` does not run unless it is named."""
    lossy = one.level is Level.LOSSY and not getattr(one, "asked", False)
    return str(getattr(one, "off", "")) or ("it changes the function" if lossy else "")


def _keep_the_law(one: Pass, before: BlockGraph, after: BlockGraph, differ: Differ | None) -> None:
    check_block(after, before)
    if one.level is Level.EXACT and differ is not None and (difference := differ(before, after)):
        raise LawBroken(f"it says that it is exact, and {difference}")


def _why_not(err: Exception) -> str:
    if isinstance(err, Declined):
        return str(err)
    if isinstance(err, LawBroken):
        return f"reverted: it broke the law of the graph: {err}"
    return f"reverted: it failed itself ({type(err).__name__}: {str(err)[:200]})"


def _judge(last: BlockGraph, fired: list[_Fired], verify: VerifyBlock) -> tuple[int | None, Verdict]:
    """The first pass, by its number among ``fired``, with which the block fails, and that verdict; None where it holds.

    ``last`` is the block with all of them.
    """
    verdict = verify(last, len(fired) <= 1)
    if verdict.passed is not False:
        return None, verdict
    for number, one in enumerate(fired if len(fired) > 1 else ()):
        verdict = verify(one.after, number == 0)
        if verdict.passed is False:
            return number, verdict
    if len(fired) <= 1:
        return 0, verdict
    return None, verdict  # another lowering was taken meanwhile, and every pass holds with it
