"""A dense FFN as one expert that every token goes to: the same products, run by the op's own kernels.

    y = W_out f(W_in x + b_in) + b_out  ==  experts(x, ids = 0, weights = 1)          with E = 1

The kernels spell each product the way that is quickest for its number of rows (``ops/kernels/gemm``). Packed
gate and up stay one product; separate ones stay two, since one would need a second copy of the weights.

Shapes     T tokens, H hidden, I intermediate: x (T, H), W_in (I or 2I, H), W_out (H, I)
Saves      time where it is measured to (``pipeline/autotune``), chiefly bfloat16 and few rows; never memory
Numerics   ROUNDING: the products sum in another order
"""

from __future__ import annotations

from moeopt.passes.base import Level
from moeopt.passes.group_experts import group
from moeopt.passes.split_dense_ffn import for_every_token
from moeopt.recognise.dense_ffn import DenseFFN
from moeopt.recognise.recognition import Recognition
from moeopt.rewrite.block_graph import BlockGraph


class FuseDenseFFN:
    """See the module's docstring."""

    name = "fuse_dense_ffn"
    level = Level.ROUNDING
    kind = "fuse"

    def apply(self, block: BlockGraph) -> int:
        """How many dense FFNs became the op; 0 where the block was read as something else."""
        return group(block) if block.captured is not None and block.captured.kind == self.kind else 0


def fuse(ffn: DenseFFN) -> Recognition:
    """``ffn`` as the op with one expert, on the same weights."""
    return for_every_token(ffn, [ffn.weights], ffn.spec)
