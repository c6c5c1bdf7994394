"""Which kernel a rewritten block runs, in the words of the report."""

from __future__ import annotations

from torch import nn

from moeopt.ir.row_function import RowFunction
from moeopt.ops.kernels.cuda import describe_path
from moeopt.recognise.recognition import Recognition
from moeopt.rewrite.live_weights import LiveExpertWeights

ON_CODES = "moeopt::quantized_experts (grouped, one op)"
"""Of experts that are codes in the user's module."""


def lowering_text(block: nn.Module, found: Recognition) -> str:
    """``moeopt::experts`` with the kernel that takes these weights; on a GPU with why no better one does.

    Args:
        block: the module that was rewritten, with its weights on their device.
        found: one mixture of it.
    """
    if isinstance(found.spec, RowFunction):
        return "moeopt::row_function (expert by expert, one op)"
    weights = LiveExpertWeights(block, found.experts, (found.spec.w_in_layout, found.spec.w_out_layout))
    if weights.w_out(0).device.type != "cuda":
        return "moeopt::experts (grouped, one op)"
    path, why = describe_path(weights, found.spec)
    return f"moeopt::experts ({path}: {why})"
