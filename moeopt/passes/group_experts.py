"""The experts of a block, however it dispatches to them, as one grouped-expert op.

    for e in range(E):  y.index_add_(0, t_e, expert_e(x[t_e]) * w_e)
     ==  y = experts(x, ids, weights)                                       and any other spelling of the same sum

Ids, weights, Parameters and the function of an expert are read from the recorded calls (``moeopt.recognise.experts``);
``moeopt.rewrite.replace_experts`` writes the nodes that replace the sum. No output reads the dispatch and the loop over
experts any more, so they are gone; everything else stays. Sizes of the recorded calls become sizes of the inputs.

Shapes     T tokens, E experts, K chosen per token, H hidden: x (T, H), ids (T, K), weights (T, K) -> y (T, H)
Seen in    every MoE block that is not grouped already
Saves      the Python loop, the gather and scatter of each expert, and the synchronisation that the loop needs
Numerics   ROUNDING: a token's K contributions are added in another order; products and activations are unchanged
"""

from __future__ import annotations

from moeopt.passes.base import Level
from moeopt.rewrite.block_graph import BlockGraph
from moeopt.rewrite.build import build
from moeopt.rewrite.symbolic_shapes import generalize


class GroupExperts:
    """See the module's docstring."""

    name = "group_experts"
    level = Level.ROUNDING
    kind = "experts"

    def apply(self, block: BlockGraph) -> int:
        """How many ``moeopt::experts`` nodes the block has now; 0 where something else was recognised in it."""
        return group(block) if block.captured is not None and block.captured.kind == self.kind else 0


def group(block: BlockGraph) -> int:
    """Make a graph of the block's own code, with an op where each recognised sum stood; how many there are.

    Raises:
        Declined: the recorded calls differ in something other than sizes.
    """
    captured = block.captured
    assert captured is not None
    plan = generalize(captured.plans, captured.shapes)
    block.guard, block.routers = captured.finish()
    block.weights, block.frozen = list(captured.weights), dict(captured.frozen)
    block.per_token = list(captured.per_token)
    build(block, plan)
    return len(block.weights)
