"""``torch.cdist`` in calls of different sizes: one op, which PyTorch traces as one of two.

PyTorch computes Euclidean distances by a product of matrices where either side has more than 25 rows, and directly
below. A trace shows which, ``_euclidean_dist`` or ``_cdist_forward``; ``cdist`` itself, which chooses by the sizes of
each call as it did, stands for both.
"""

from __future__ import annotations

import dataclasses

import torch

from moeopt.rewrite.keep import Plan, Step

aten = torch.ops.aten
_PRODUCT, _DIRECT = aten._euclidean_dist.default, aten._cdist_forward.default


def one_distance(plans: list[Plan]) -> list[Plan]:
    """The plans, with ``cdist`` where some of them take one of the two ops and the others the other."""
    if len({len(plan.steps) for plan in plans}) > 1:
        return plans
    steps = [list(plan.steps) for plan in plans]
    for number, versions in enumerate(zip(*steps, strict=True)):
        targets = {step.target for step in versions if step.kind == "call"}
        if targets == {_PRODUCT, _DIRECT} and all(map(_left_to_pytorch, versions)):
            for mine, step in zip(steps, versions, strict=True):
                mine[number] = dataclasses.replace(step, target=aten.cdist.default, args=(*step.args[:2], 2.0, None))
    return [dataclasses.replace(plan, steps=mine) for plan, mine in zip(plans, steps, strict=True)]


def _left_to_pytorch(step: Step) -> bool:
    """Whether a step is a distance whose form PyTorch chose by the sizes."""
    if step.target is _PRODUCT:
        return True
    _, _, p, mode = step.args
    return step.target is _DIRECT and p == 2 and mode in (None, 0)
