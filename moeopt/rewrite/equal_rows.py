"""A router whose weight has equal rows: their experts' scores are equal for every token, and some are never chosen.

So it is in a model that was initialised with zeros, or grown from a dense one by copies. What no input reaches cannot
be checked, and a decline then names what the probes met there, not the cause.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

_MOST = 4096
"""Rows of a weight that may be a router's."""


def equal_rows_reason(module: nn.Module) -> str:
    """Why a block with such a router cannot be judged, and the way out; "" without one.

    Asked where a block was declined. A weight may be a router's where it has one row (or one column) for each expert
    and no other Parameter has its shape; experts have Parameters of one shape, one or several each, or a stack.
    """
    shapes = Counter(p.shape for p in module.parameters())
    alike = [n for n in shapes.values() if n > 1] + [shape[0] for shape in shapes if len(shape) == 3]
    for path, weight in module.named_parameters():
        if weight.dim() != 2 or shapes[weight.shape] > 1 or not weight.is_floating_point() or weight.is_meta:
            continue
        for rows, word in ((weight.detach(), "rows"), (weight.detach().t(), "columns")):
            count = len(rows)
            if (
                1 < count <= _MOST
                and any(n % count == 0 for n in alike)
                and rows.numel()
                and bool(rows.isfinite().all())
            ):
                different = len(torch.unique(rows.float(), dim=0))
                if different < count:
                    return (
                        f"{path} has {different} different {word} for {count} experts, so that experts of equal {word} "
                        "have equal scores for every token, and those that are never chosen could not be checked; load "
                        f"the trained weights, or give each expert {word} of its own, and optimise again"
                    )
    return ""
