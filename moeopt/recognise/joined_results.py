"""Experts whose results decide about each other, or are put together in another way than by a sum.

    y = (softmax(gate(cat(e_1(x), e_2(x)))) * e(x)).sum()        the weights are made of the results
    y = stack(e_1(x), e_2(x)).max(0)                             no weighed sum

Looked for only to say why a block is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import fx

from moeopt.capture.op_kinds import GATES, op_name
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Tape
from moeopt.recognise.gemm_sites import GemmSite

_JOINS = ("max", "min", "amax", "amin", "var", "var_mean", "std", "std_mean", "median", "mode", "prod", "logsumexp",
          "linalg_vector_norm", "norm", "kthvalue", "native_layer_norm")  # fmt: skip
"""What makes one number of several in another way than by a sum."""


def joins(nodes: list[fx.Node], size: int) -> fx.Node | None:
    """The first of the ``nodes`` that makes one result of the outputs of several experts side by side, of ``size``
    numbers each, and is no sum; a norm over the features of each alone is none."""
    for node in (n for n in nodes if op_name(n) in _JOINS):
        given = math.prod(node.all_input_nodes[0].meta.get("shape") or ())
        gives = [n for n in (node, *node.users) if n.meta.get("shape") is not None]
        normed = op_name(node) == "native_layer_norm" and len(node.args[1]) > 1  # type: ignore[arg-type]
        if given >= 2 * size and (normed or any(math.prod(n.meta["shape"]) == size for n in gives[:1])):
            return node
    return None


def decided_by_results(tape: Tape, sites: Collection[GemmSite], target: fx.Node) -> str:
    """What to say where the experts' results decide which of them are chosen, or how much each counts."""
    behind = set(descendants(tape, [site.node for site in sites])) & ancestors([target])
    choice = next((n for n in tape.nodes if n in behind and op_name(n) in ("topk", "argmax", "sort", "argsort")), None)
    if choice is None:
        results = {site.node for site in sites}
        gates = (n for n in tape.nodes if n in behind and op_name(n) in GATES and results <= ancestors([n]))
        if (gate := next(gates, None)) is None:
            return ""
        return (
            f"they are weighed by what is computed of their own results ({op_name(gate)}), so all of them run for "
            "every token before any weight is known, and the op would leave none out; compute the gate from something "
            "that is known before they run, or leave the block as it is"
        )
    return (
        f"they are chosen by their own results ({op_name(choice)}), so all of them run for every token before any is "
        "chosen, and the op would leave none out; choose by something that is known before they run, or leave the "
        "block as it is"
    )
