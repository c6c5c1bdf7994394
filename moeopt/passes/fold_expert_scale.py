"""A constant factor on the experts' sum goes into the routing weights, which are fewer.

    experts(x, ids, w) * s  ==  experts(x, ids, w * s)              for a number s; the sum is linear in w

Shapes     T tokens, K chosen per token, H hidden: the factor meets (T, K) numbers instead of (T, H)
Seen in    blocks that end in ``y * routed_scaling_factor``
Saves      one pass over (T, H) of memory: about 1 % of a block at 1024 tokens, nothing at one (benchmarks/passes.py)
Numerics   ROUNDING: each weight is rounded once more and the sum once less
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.errors import Declined
from moeopt.passes.base import Level
from moeopt.rewrite.block_graph import BlockGraph

aten = torch.ops.aten

_WIDE = (torch.float32, torch.float64)
_MOVES = ("reshape", "movedim")


@dataclass(frozen=True)
class Scaled:
    """``factor`` is what ``node``, a mul or div by a number, does to the sum of ``experts``."""

    experts: fx.Node
    node: fx.Node
    factor: float


class FoldExpertScale:
    """See the module's docstring."""

    name = "fold_expert_scale"
    level = Level.ROUNDING
    engines_only = "in PyTorch it saves less than can be measured (benchmarks/passes.py)"

    def apply(self, block: BlockGraph) -> int:
        """How many factors went into weights.

        Raises:
            Declined: there is a factor, and the weights cannot take it.
        """
        found = list(scaled_sums(block))
        for one in found:
            check(block, one)
        for one in found:
            fold(block, one)
        return len(found)


def scaled_sums(block: BlockGraph) -> Iterator[Scaled]:
    """Each sum of experts that is multiplied or divided by a number and read by nothing else."""
    for experts in block.experts_nodes():
        node = experts
        while len(node.users) == 1:
            (node,) = node.users
            if node.op != "call_function" or op_name(node) not in _MOVES:
                break
        name = op_name(node)
        number = node.args[1] if name in ("mul", "div") and len(node.args) == 2 and not node.kwargs else None
        if isinstance(number, (int, float)) and node is not experts:
            yield Scaled(experts, node, float(number) if name == "mul" else 1.0 / number if number else math.inf)


def check(block: BlockGraph, one: Scaled) -> None:
    """Raise ``Declined`` where the weights cannot take the factor."""
    _, index, _, _, weights = one.experts.args
    where = one.node.meta.get("source") or None
    spec = block.weights[index].spec  # type: ignore[index]
    if spec.weight_on != "output":
        raise Declined("the routing weights multiply the experts' input, and an activation follows", where)
    if not math.isfinite(one.factor):
        raise Declined(f"the factor is {one.factor}", where)
    if one.node.meta.get("dtype") is not one.experts.meta.get("dtype"):
        raise Declined("the factor is applied in another dtype than that of the sum", where)
    dtype = weights.meta.get("dtype")  # type: ignore[union-attr]
    exact = bool(one.factor) and math.frexp(one.factor)[0] in (0.5, -0.5)
    if dtype not in _WIDE and not exact:
        raise Declined(f"the routing weights are {dtype}, in which a product with {one.factor:g} is rounded", where)


def fold(block: BlockGraph, one: Scaled) -> None:
    """Multiply the weights of ``one`` instead of the sum."""
    held, index, x, ids, weights = one.experts.args
    assert isinstance(index, int)
    with block.graph.inserting_before(one.experts):
        scaled = block.graph.call_function(aten.mul.Tensor, (weights, one.factor))
    scaled.meta = dict(weights.meta) | {"source": one.node.meta.get("source", "")}  # type: ignore[union-attr]
    one.experts.args = (held, index, x, ids, scaled)
    one.node.replace_all_uses_with(one.node.args[0])  # type: ignore[arg-type]
    block.graph.erase_node(one.node)
    if one.factor < 0:  # a router tells a runtime that no weight is negative
        block.routers[index] = None
