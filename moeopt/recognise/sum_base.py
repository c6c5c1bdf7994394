"""What the experts' sum is added onto: a residual, what a shared expert gives; or why it is no tensor of the block.

Legend: T tokens, K ids of each, H features.
"""

from __future__ import annotations

import torch
from torch import fx

from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.weight_refs import ExpertRef, parts_of
from moeopt.recognise.combine import Combine
from moeopt.recognise.experts_hit import siblings
from moeopt.recognise.token_rows import Tokens, rows_of


def held_base(tape: Tape, combine: Combine, before: list[fx.Node]) -> fx.Node | None:
    """The last node of ``before`` whose rows are what stays of the sum without the experts; None where there is none,
    or nothing stays."""
    if combine.base is None:
        return None
    for node in reversed(before):
        alike = node.meta["dtype"] == combine.base.dtype and node.meta["shape"] == combine.node.meta["shape"]
        if alike and node.op != "get_attr" and torch.equal(rows_of(tape.value(node), combine.axis), combine.base):
            return node
    return None


def base_of(
    tape: Tape, tokens: Tokens, combine: Combine, held: fx.Node | None, experts: list[ExpertRef],
    ids: torch.Tensor | None,
) -> fx.Node | None:  # fmt: skip
    """The tensor that the experts' sum is added onto, when there is one.

    Args:
        held: the tensor that has what stays of the sum without the experts. It may hold what a shared expert out of
            the experts' own list gives, which no router has a part in.
        ids: (T, K), of the experts.

    Raises:
        Declined: something stays that no tensor has, or that other experts of the block gave.
    """
    if combine.base is None:
        return None
    want = combine.base
    if held is not None:
        names = dict(tape.root.named_parameters(remove_duplicate=False))
        each_part = zip(*(parts_of(e) for e in experts), strict=True)
        others = set[str]().union(*(siblings({p.path for p in parts}, names) for parts in each_part))
        read = {str(a.target) for a in ancestors([held], {tokens.node}) if a.op == "get_attr"}
        if others & read and not read <= others:
            raise Declined(
                "other experts of the same block are computed in another way and added to these; all of a block's "
                "experts or none are rewritten",
                combine.node.meta.get("source"),
            )
        return held
    beyond = torch.zeros(len(want), 0) if ids is None else (ids < 0) | (ids >= len(experts))
    if ids is not None and not bool((want.any(-1) & ~beyond.any(-1)).any()):
        named = ", ".join(map(str, ids[beyond].unique().tolist()))
        raise Declined(
            f"its router also chooses ids ({named}) whose experts are not like the other {len(experts)} (zeros, "
            "copies of the token, constants, another function), and one tensor joins what all of them give (cat, "
            "stack, a buffer) before it is summed; add what these give in a step of their own, "
            "y.index_add_(0, rows, ...) for each, and the others are rewritten",
            combine.node.meta.get("source"),
        )
    if (unlike := _experts_with_constants(combine)) is not None:
        raise Declined(
            f"its experts do not all compute the same function ({unlike} of {len(experts)} add a constant to what "
            "their last product gives, and the others add none); only alike experts can be grouped",
            combine.node.meta.get("source"),
        )
    raise Declined(
        "tokens that no expert serves keep another value (a pass-through of dropped tokens, or a sum that starts "
        "from something computed on the way), which the op does not carry",
        combine.node.meta.get("source"),
    )


def _experts_with_constants(combine: Combine) -> int | None:
    """How many experts add a constant to what they give, where that is what stays of the sum without their products;
    None where it is something else, or all of them do it."""
    assert combine.base is not None
    weights, base = combine.weights.double(), combine.base.double()
    served = (weights != 0).any(0)
    if len(weights) <= weights.shape[1] or not bool(base.isfinite().all()):
        return None
    constants = torch.linalg.lstsq(weights[:, served], base).solution
    if float((weights[:, served] @ constants - base).abs().max()) > 1e-4 * float(base.abs().max()):
        return None
    adds = int((constants.abs() > 1e-3 * constants.abs().max()).any(1).sum())
    return adds if adds < int(served.sum()) else None
