"""What a block does with expert ids that name none of its experts, found by running it on such ids.

    the block's own code          the rewritten block, ids as they are        conclusion
    gives the same as             drops ids below 0 and (mostly) from E on    they are free
    gives what id + E gives       -                                           they wrap, as an index does in Python
    anything else, or raises      -                                           they are outside the range

Each probe is the first recorded call with one id replaced. What cannot be told apart, or not be tried (on a GPU an
index out of bounds ends the process), is outside the range, and the block's own code runs on such calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeopt.capture.isolated_run import undone
from moeopt.capture.tape import Tape, clone_inputs, record
from moeopt.capture.tree import ArgsKwargs, tree_leaves, tree_map
from moeopt.errors import CaptureError, Declined
from moeopt.ops.experts import experts
from moeopt.recognise.id_bounds import IdBounds, open_ids
from moeopt.recognise.named_ids import are_named
from moeopt.recognise.recognition import Recognition
from moeopt.rewrite.block_graph import BlockGraph, Slot, compiled
from moeopt.rewrite.build import build
from moeopt.rewrite.id_range import IdRange
from moeopt.rewrite.live_bank import live_bank
from moeopt.rewrite.plan_kept_steps import kept_steps
from moeopt.rewrite.replace_experts import experts_rewrite
from moeopt.value_types import FxTarget, PyObject

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2**-7, torch.bfloat16: 2**-5}
"""Of the largest value: what two runs of one function on the same ids may differ by."""
FAR = 4
"""Two readings of an id are told apart where their results differ by so many times that."""


def id_ranges(
    module: nn.Module,
    calls: list[ArgsKwargs],
    tapes: list[Tape],
    founds: list[list[Recognition]],
    given: Sequence[IdBounds] = (),
) -> list[IdRange]:
    """For each of a block's recognised experts, the ids for which the op in their place does the same.

    Args:
        calls, tapes: some calls of ``module`` and what was recorded.
        founds: what was recognised in each.
        given: bounds of the tensor arguments, which the caller keeps.
    """
    ranges = []
    for index, found in enumerate(founds[0]):
        E = len(found.experts)
        if are_named(found.routing.ids):  # what a number that names none does, only the block's own code knows
            ranges.append(IdRange(0, E - 1))
            continue
        opened = [open_ids(t, f[index].routing, E, given) for t, f in zip(tapes, founds, strict=True)]
        ids = [i for i in opened if i is not None]
        if not ids:
            ranges.append(IdRange())
            continue
        seen = IdRange(min(0, *(int(i.min()) for i in ids)), max(E - 1, *(int(i.max()) for i in ids)))
        try:
            probe = _Probe(module, calls[0], tapes[0], founds[0], index)
            ranges.append(probe.range(seen) if probe.runs() else seen)
        except (Declined, RuntimeError):  # the first call holds sizes or choices that cannot be repeated alone
            ranges.append(seen)
    return ranges


class _Probe:
    """One id of a recorded call, replaced at will, in the block's own code and in the rewritten block."""

    def __init__(self, module: nn.Module, call: ArgsKwargs, tape: Tape, found: list[Recognition], index: int) -> None:
        self.module, self.call, self.found, self.index = module, call, found, index
        extraction = found[index].routing.ids
        assert extraction is not None and extraction.source is not None
        self.ids = extraction.run(tape).long()
        weights = found[index].routing.weights.run(tape, self.ids).double().abs()
        inside = (self.ids >= 0) & (self.ids < len(found[index].experts)) & weights.isfinite()
        self.place = int(torch.where(inside, weights, -1.0).argmax())
        token, slot = divmod(self.place, self.ids.shape[1])
        self.source: fx.Node = extraction.nodes[slot] if extraction.beside else extraction.source
        self.value: Tensor = tape.value(self.source).detach().clone()
        self.entry = token
        if not extraction.beside:
            entries = extraction.on(torch.arange(self.value.numel()).reshape(self.value.shape))
            self.entry = int(entries.reshape(-1)[self.place])
        self.block = BlockGraph("", root=module)
        build(self.block, kept_steps(tape, [experts_rewrite(f, i, IdRange()) for i, f in enumerate(found)]))
        self._run = compiled(self.block.graph)
        self.tensors = [leaf for leaf in tree_leaves(list(call)) if isinstance(leaf, Tensor)]
        self._by_own_code: dict[int, list[Tensor] | None] = {}
        self.given = [n for n in tape.nodes if n.op == "placeholder"]

    def runs(self) -> bool:
        """Whether both give the same on the call as it was recorded, on memory where a wrong index is an error."""
        parts = (*self.tensors, *self.module.parameters(), *self.module.buffers())
        if any(t.device.type != "cpu" for t in parts):
            return False
        was = int(self.ids.reshape(-1)[self.place])
        self.usual = self.rewritten(was)
        return self.usual is not None and self._same(self.own(was), self.usual)

    def range(self, seen: IdRange) -> IdRange:
        """The ids on which the block's own code and the op agree; at least those that were ``seen``."""
        E = len(self.found[self.index].experts)
        assert seen.lowest is not None and seen.highest is not None
        lowest, highest, wraps = seen.lowest, seen.highest, False
        below = [self._dropped(v) for v in (-1, -E, -E - 1)]
        above = [self._dropped(v) for v in (E, E + 1, E + 3, 2 * E + 1)]
        if lowest == 0 and self._wrapped(-1, E) and self._wrapped(-E, E):
            lowest, wraps = -E, True
        elif below[0]:
            lowest = min(lowest, -1)
        if above[0]:
            highest = max(highest, E)
        return IdRange(None if all(below) else lowest, None if all(above) else highest, wraps)

    def _dropped(self, v: int) -> bool:
        op = self.rewritten(v)
        return self._told_apart(op, self.usual) and self._same(self.own(v), op)

    def _wrapped(self, v: int, experts: int) -> bool:
        op = self.rewritten(v + experts)
        return self._told_apart(op, self.rewritten(v)) and self._same(self.own(v), op)

    def own(self, v: int) -> list[Tensor] | None:
        """What the block's own code returns with ``v`` for the id, recorded once; None where it raises."""
        if v not in self._by_own_code:
            self._by_own_code[v] = self._recorded(v)
        return self._by_own_code[v]

    def _recorded(self, v: int) -> list[Tensor] | None:
        value = self.value.clone()
        value.view(-1)[self.entry] = v
        if int(value.view(-1)[self.entry]) != v:  # its dtype has no such value
            return None
        hits, call, given = 0, self.call, self.source.op == "placeholder"
        if given:
            n = self.given.index(self.source)
            call = tree_map(Tensor, lambda t: value if t is self.tensors[n] else t, self.call)
            hits = 1

        def steer(func: FxTarget, args: tuple[Any, ...], out: PyObject) -> PyObject:
            nonlocal hits
            if isinstance(out, Tensor) and out.is_floating_point() and "empty" in str(func):
                return out.fill_(math.nan)  # what a row holds that nobody writes is else a matter of chance
            alike = isinstance(out, Tensor) and func is self.source.target and out.dtype == value.dtype
            if alike and not given and not hits and torch.equal(out, self.value):
                hits = 1
                return value
            return out

        try:
            tape = record(self.module, *call, steer=steer)
        except CaptureError:
            return None
        return _floats(tree_map(fx.Node, tape.value, tape.output)) if hits else None

    def rewritten(self, v: int) -> list[Tensor] | None:
        """What the rewritten block returns with ``v`` for the id; None where it raises."""
        ids = self.ids.clone()
        ids.view(-1)[self.place] = v
        args = [t for t in tree_leaves(list(clone_inputs(self.call))) if isinstance(t, Tensor)]
        with undone(self.module) as watched:
            try:
                with watched:
                    leaves = self._run(self.module, _Bank(self.module, self.found, self.block, self.index, ids), *args)
            except RuntimeError:
                return None
        return _floats(tree_map(Slot, lambda slot: leaves[slot.index], self.block.output))

    def _same(self, a: list[Tensor] | None, b: list[Tensor] | None, times: float = 1.0) -> bool:
        if a is None or b is None or [t.shape for t in a] != [t.shape for t in b]:
            return False
        return all(_distance(x, y) <= times * CLOSE.get(x.dtype, 1e-3) for x, y in zip(a, b, strict=True))

    def _told_apart(self, a: list[Tensor] | None, b: list[Tensor] | None) -> bool:
        return a is not None and b is not None and not self._same(a, b, FAR)


class _Bank:
    """Stands for the ``block`` input of a graph, which looks up experts and constants; number ``index`` has ``ids``."""

    def __init__(self, module: nn.Module, found: list[Recognition], block: BlockGraph, index: int, ids: Tensor) -> None:
        self.module, self.found, self.index, self.ids, self.constants = module, found, index, ids, block.constants

    def experts(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        found = self.found[index]
        bank = live_bank(self.module, found.experts, found.spec)
        return experts(x, self.ids if index == self.index else ids, weights, bank, found.spec)


def _floats(tree: PyObject) -> list[Tensor]:
    return [t.detach().clone() for t in tree_leaves([tree]) if isinstance(t, Tensor) and t.is_floating_point()]


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))
