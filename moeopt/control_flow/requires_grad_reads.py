"""Code that reads ``requires_grad`` of its Parameters: where the flag changes the outputs, the block is declined.

Weights are often frozen and unfrozen after the rewrite, and a graph does not read the flag. So a block whose code names
``requires_grad`` is run with the flags as they are, all off, and all on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.rewrite.reads import Reads
from moeopt.value_types import PyObject
from moeopt.verification.oracle import record_selections
from moeopt.verification.trees import flatten


def requires_grad_decides(
    module: nn.Module, original: Callable[..., Any], call: ArgsKwargs, reads: Reads | None
) -> str:  # fmt: skip
    """Why ``module`` has other outputs once its weights are frozen or unfrozen, in a sentence; "" where it has not."""
    if reads is None or "requires_grad" not in reads.names:
        return ""
    flags = [(p, p.requires_grad) for p in module.parameters() if p.is_floating_point()]
    if any(p.is_inference() or not p.is_leaf for p, _ in flags):
        return ""
    before = flatten(record_selections(original, *call)[0])[0]
    try:
        for value in (False, True):
            for p, _ in flags:
                p.requires_grad_(value)
            now = flatten(record_selections(original, *call)[0])[0]
            if len(now) != len(before) or not all(map(_same, before, now)):
                return (
                    "its forward asks whether its Parameters require a gradient (requires_grad) and computes something "
                    "else where they do, which the rewritten code would not follow; ask self.training, or an attribute"
                )
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return ""


def _same(a: PyObject, b: PyObject) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return bool(a == b)
