"""The experts' weights in fewer bits: codes and scales where floats were.

    experts(x, ids, weights; W)  ->  experts(x, ids, weights; scale * code)         code = round(W / scale)

``QuantPlan(method=)`` says how codes and scales are found: to the nearest code as above, with scales that are searched,
or by GPTQ (``rewrite/rounded_experts``), by the rows that reached the experts on the user's data.

Routers, norms, biases and everything around the experts stay as they are. The block then computes *another* function,
near the first: it is verified against its own code on the floats that the codes stand for, and what that loses against
the original is measured apart (``certificate.loss``).

Shapes     a weight (N out, K in) becomes codes of its size and a scale for each block (``ir/weight_format``)
Seen in    wherever ``quantize=`` asks for it, block by block as its plan says
Saves      memory and the bytes read for a token: int8 a quarter of float32, int4 with blocks of 32 a seventh
Numerics   LOSSY: each weight moves by half a code at most, by more with GPTQ; the user's limits judge what that does
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeopt.errors import CheckpointError, Declined
from moeopt.ir.row_function import RowFunction
from moeopt.ir.weight_format import FORMATS, WeightFormat
from moeopt.options.quant_plan import CHECKPOINT, FLOAT, NEAREST, QuantPlan
from moeopt.passes.base import Level
from moeopt.published.experts import PublishedExperts, Unbound
from moeopt.published.file_codes import FileExperts
from moeopt.rewrite.block_graph import BlockGraph, ExpertWeightRefs, GivenCodes
from moeopt.rewrite.expert_rows import ExpertRows
from moeopt.rewrite.live_codes import shapes_of
from moeopt.rewrite.live_weights import LiveExpertWeights
from moeopt.rewrite.rounded_experts import rounded_experts

BankRows = Mapping[tuple[str, int], ExpertRows]
"""By the name of a block and the number of a bank in it, what reached its experts."""


class QuantizeExperts:
    """See the module's docstring; without a plan the pass is off. ``rows``: what the plan's method weighs by."""

    name = "quantize_experts"
    level = Level.LOSSY

    def __init__(
        self, plan: QuantPlan | None = None, published: PublishedExperts | FileExperts | None = None,
        rows: BankRows | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.published, self.rows = plan, published, rows or {}
        self.asked = plan is not None

    def apply(self, block: BlockGraph) -> int:
        """How many ``moeopt::experts`` nodes have codes now.

        Raises:
            Declined: the plan names a format for the block, and none of its experts can have one.
        """
        if self.plan is None:
            raise Declined("no format was asked for: give quantize='int8', 'int4', 'fp8', 'mxfp4' or a QuantPlan")
        name = self.plan.format_of(block.name)
        if name == FLOAT or block.captured is not None:
            return 0
        reasons = []
        for index, held in enumerate(block.weights):
            reason = why_not(block, held)
            if not reason and name == CHECKPOINT:
                reason = self._take_published(block, index)
            if reason:
                reasons.append(reason)
            elif name != CHECKPOINT:
                self._round(block, index, FORMATS[name])
        if reasons and not block.formats:
            raise Declined(reasons[0])
        return len(block.formats)

    def _round(self, block: BlockGraph, index: int, format: WeightFormat) -> None:
        """Give a bank a format, and the codes of a method that has its own; to nearest they are rounded when read."""
        assert self.plan is not None
        block.formats[index] = format
        if self.plan.method == NEAREST or block.root is None:
            return
        refs, spec = block.weights[index]
        rows = self.rows.get((block.name, index))
        block.formats[index], block.codes[index] = rounded_experts(
            block.root, refs, spec, format, self.plan.method, rows
        )

    def _take_published(self, block: BlockGraph, index: int) -> str:
        """Give a bank the checkpoint's codes; why not, or ""."""
        refs, _ = block.weights[index]
        if self.published is None or block.root is None:
            return "there is no checkpoint to take codes of"
        if any(ref.neurons is not None for ref in refs):
            return "its experts are groups of one FFN's neurons, which no checkpoint stores as experts"
        floats = LiveExpertWeights(block.root, refs, ("oi", "oi"))
        try:
            found = self.published.bank(
                block.name, len(refs), lambda e: [w.detach() for w in (*floats.w_in(e), floats.w_out(e))]
            )
        except (Unbound, CheckpointError) as err:
            return str(err)
        if found is None:
            return ""
        bank, exact = found
        block.formats[index], block.codes[index] = bank.format, GivenCodes(bank.tensors(), exact)
        return ""


LARGEST = 1e36
"""Of a weight: 448 times a scale of it, and sums of it, stay finite in float32 and bfloat16."""


def why_not(block: BlockGraph, held: ExpertWeightRefs) -> str:
    """Why these experts keep their floats, a sentence; "" where they can be quantised."""
    refs, spec = held
    if isinstance(spec, RowFunction):
        return "its experts are a function of a row of their own, and only pairs of matmuls have a quantised form"
    if len({tuple(shapes_of(ref)) for ref in refs}) > 1:
        return "its experts have several sizes, and a quantised bank holds experts of one size"
    if block.root is None:
        return ""
    floats = LiveExpertWeights(block.root, refs, ("oi", "oi"))
    for e in range(len(refs)):
        for w in (*floats.w_in(e), floats.w_out(e)):
            if not bool(torch.isfinite(w).all()) or float(w.detach().abs().max()) > LARGEST:
                return (
                    f"expert {e} has weights that are NaN, infinite or beyond {LARGEST:g}, for which there is no code"
                )
    return ""
