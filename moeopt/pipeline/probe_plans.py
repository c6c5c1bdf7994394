"""What the probe calls of one block become as steps, and whether they were read alike.

A reading takes values for what they are, and in one call of few rows two things may be one by accident: where no row
was left out, the rows that were kept are all rows, and the sum of the experts is the end of the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from moeopt.capture.same_graph import same_computation
from moeopt.capture.tape import Tape, record
from moeopt.capture.tree import ArgsKwargs, tree_map
from moeopt.errors import Declined
from moeopt.obstacles import Rank
from moeopt.pipeline.call_guards import tensors_of
from moeopt.pipeline.coverage import Reader
from moeopt.recognise.experts_hit import ExpertsNotHit
from moeopt.recognise.recognition import Recognition
from moeopt.rewrite.id_range import IdRange
from moeopt.rewrite.kept_steps import ChangesOutside, KeptSteps, StepRef
from moeopt.rewrite.plan_kept_steps import kept_steps
from moeopt.rewrite.replace_experts import experts_rewrite
from moeopt.rewrite.symbolic_shapes import generalize, step_names
from moeopt.verification.state import in_mode


def read_alike(plans: Sequence[KeptSteps]) -> bool:
    """Whether all calls of a block became the same steps on each other's results, sizes and numbers left out."""
    first = plans[0]
    return all(step_names(p) == step_names(first) and _wiring(p) == _wiring(first) for p in plans[1:])


def _wiring(plan: KeptSteps) -> list[StepRef]:
    """The results that the steps of a plan read, and what it gives back, in order."""
    read: list[StepRef] = []
    tree_map(StepRef, read.append, [*((s.args, s.kwargs) for s in plan.steps), plan.output, plan.mutations])
    return read


def plan_of(
    tape: Tape, recognitions: list[Recognition], ranges: list[IdRange], scratch: Collection[tuple[str, str]]
) -> KeptSteps:
    """The steps of one recorded call in which the experts' op stands for each recognised group of experts."""
    return kept_steps(tape, [experts_rewrite(f, i, ranges[i]) for i, f in enumerate(recognitions)], scratch)


class ReadOtherwise(Declined):
    """Another call of a block was read as other experts, as calls of few rows may be: more of them may tell."""

    may_tell = True


UNLIKE = (ReadOtherwise, ChangesOutside)
"""Calls of one block were not read alike."""


def refuse_other_experts(first: list[Recognition], other: list[Recognition]) -> None:
    """``ReadOtherwise`` where two calls of a block were not read as the same experts of the same function."""
    if len(first) != len(other) or any(
        a.experts != b.experts or a.spec != b.spec for a, b in zip(first, other, strict=False)
    ):
        raise ReadOtherwise(
            "two probes with different tokens read its experts differently; its dispatch depends on the data",
            rank=Rank.READING,
        )


def why_other(err: Declined, founds: list[list[Recognition]]) -> Declined:
    """``err``; or why calls differ where few sequences choose few of the experts, and the rest is skipped."""
    if not any(f.routing.of_groups for found in founds for f in found):
        return err
    return Declined(
        "its experts are chosen for whole sequences, and its code skips those that none chose (an if in the loop over "
        "the experts), so that calls of few sequences show other steps than calls of many; leave that if out, since "
        "products of no rows are no error, or repeat each id for its tokens (ids.repeat_interleave(x.shape[1], 0)) and "
        "route the rows",
        err.where,
        rank=err.rank,
    )


@contextlib.contextmanager
def skipped_by_few(founds: list[list[Recognition]]) -> Iterator[None]:
    """Calls of few sequences, read after the first one: where no mask of an expert that none chose is computed
    before the sum, nothing that is read from them says why."""
    try:
        yield
    except ExpertsNotHit:
        raise
    except Declined as err:
        raise (why_other(err, founds) if err.rank < Rank.FORBIDS else err) from None


def same_in_other_mode(
    module: nn.Module, call: ArgsKwargs, here: Tape, plan: KeptSteps, recognitions: list[Recognition], reader: Reader,
    ranges: list[IdRange], scratch: Collection[tuple[str, str]],
) -> bool:  # fmt: skip
    """Whether training and evaluation mode compute the same, judged by a trace in the other mode."""
    try:
        with in_mode(module, not module.training):
            light = record(module, *call, keep_values=False)
            if light.random_nodes():
                return False
            if same_computation(here, light):
                return True
            tape = record(module, *call)
            other = plan_of(tape, reader.again(tape, recognitions), ranges, scratch)
            generalize([plan, other], [[tuple(t.shape) for t in tensors_of(call)]] * 2)
            return True
    except Declined:
        return False
