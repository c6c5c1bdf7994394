"""The tensor onto which the experts' sum is added (a residual, a shared expert's result), or why there is none.

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


def tensor_of_base(tape: Tape, combine: Combine, before: list[fx.Node]) -> fx.Node | None:
    """The last node of ``before`` whose value is the base of the sum, that is the sum with all experts' results zero.

    None where the base is zero, or no node has it.
    """
    if combine.base is None:
        return None
    for node in reversed(before):
        alike = node.meta["dtype"] == combine.base.dtype and node.meta["shape"] == combine.node.meta["shape"]
        if alike and node.op != "get_attr" and torch.equal(rows_of(tape.value(node), combine.axis), combine.base):
            return node
    return None


def checked_base(
    tape: Tape, tokens: Tokens, combine: Combine, tensor: fx.Node | None, experts: list[ExpertRef],
    ids: torch.Tensor | None,
) -> fx.Node | None:  # fmt: skip
    """The tensor onto which the experts' sum is added; None where the base is zero.

    Args:
        tensor: what :func:`tensor_of_base` found. It may be the result of a shared expert that stands in the list of
            the routed ones.
        ids: (T, K), of the experts.

    Raises:
        Declined: no tensor holds the base, or other routed experts of the block computed it.
    """
    if combine.base is None:
        return None
    base = combine.base
    if tensor is not None:
        names = dict(tape.root.named_parameters(remove_duplicate=False))
        each_part = zip(*(parts_of(e) for e in experts), strict=True)
        sibling_weights = set[str]().union(*(siblings({p.path for p in parts}, names) for parts in each_part))
        read_weights = {str(a.target) for a in ancestors([tensor], {tokens.node}) if a.op == "get_attr"}
        if sibling_weights & read_weights and not read_weights <= sibling_weights:
            raise Declined(
                "other experts of the same block are computed in another way and added to these; all of a block's "
                "experts or none are rewritten",
                combine.node.meta.get("source"),
            )
        return tensor
    no_expert = torch.zeros(len(base), 0) if ids is None else (ids < 0) | (ids >= len(experts))
    if ids is not None and not bool((base.any(-1) & ~no_expert.any(-1)).any()):
        named = ", ".join(map(str, ids[no_expert].unique().tolist()))
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
    """How many experts add a constant to their last product, where these constants explain the base of the sum.

    None where they do not, or all experts add one.
    """
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
