"""A reshape that is a view of some inputs and copies others is one step in every recorded call.

    permute, view                 of an image of one pixel, or one that lies channels last
    permute, clone, view          of any other: ``reshape`` and ``contiguous().view`` copy where a view is refused
    permute, reshape              what both become here: it copies where it must

Only where the calls differ in such a copy: one that every call makes is the author's own.
"""

from __future__ import annotations

import dataclasses

import torch

from moeopt.capture.tree import tree_map
from moeopt.rewrite.kept_steps import KeptSteps, StepRef
from moeopt.value_types import PyObject

aten = torch.ops.aten


def without_copies_of_some(plans: list[KeptSteps]) -> list[KeptSteps]:
    """``plans`` without the copies that only some of them make before a reshape."""
    at = 0
    while all(at < len(plan.steps) for plan in plans):
        copies = [_copies_for_a_reshape(plan, at) for plan in plans]
        rest = [plan for plan, copies_here in zip(plans, copies, strict=True) if not copies_here]
        if any(copies) and rest and all(plan.steps[at].target is aten.reshape.default for plan in rest):
            plans = [_without(plan, at) if here else plan for plan, here in zip(plans, copies, strict=True)]
        at += 1
    return plans


def _copies_for_a_reshape(plan: KeptSteps, at: int) -> bool:
    """Whether step ``at`` is a contiguous copy that the next step reshapes, and that nothing else reads."""
    step, following = plan.steps[at], plan.steps[at + 1 : at + 2]
    if step.target is not aten.clone.default or step.kwargs.get("memory_format") is not torch.contiguous_format:
        return False
    read: list[StepRef] = []
    everything = [(s.args, s.kwargs) for s in plan.steps], plan.output, plan.mutations, plan.attributes
    tree_map(StepRef, read.append, everything)
    only = read.count(StepRef(at)) == 1
    return (
        only and bool(following) and following[0].target is aten.reshape.default and following[0].args[0] == StepRef(at)
    )


def _without(plan: KeptSteps, at: int) -> KeptSteps:
    """``plan`` without its step ``at``, whose operand takes its place."""
    (operand,) = plan.steps[at].args

    def now(ref: StepRef) -> StepRef:
        if ref.step == at:
            return operand  # type: ignore[no-any-return]
        return StepRef(ref.step - (ref.step > at))

    def renumbered(tree: PyObject) -> PyObject:
        return tree_map(StepRef, now, tree)

    steps = [
        dataclasses.replace(step, args=renumbered(step.args), kwargs=renumbered(step.kwargs))
        for number, step in enumerate(plan.steps)
        if number != at
    ]
    return KeptSteps(
        steps, renumbered(plan.output), renumbered(plan.mutations), renumbered(plan.attributes), plan.kept_modules
    )
