"""One matrix as codes, rounded by a plan's method, and by the rows that it is multiplied with where these are known.

Shape legend: N out, K in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.gptq import gptq
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.options.quant_plan import GPTQ, NEAREST
from moeopt.rewrite.expert_rows import OneExpertsRows

FEWEST = 16
"""Rows of which correlations are told from chance at all (``expert_rows``); of fewer GPTQ uses none."""


def rounded_matrix(
    w_NK: Tensor, format: WeightFormat, name: str, method: str, rows: OneExpertsRows | None
) -> QuantizedWeight:
    """``w_NK`` in ``format``; ``rows`` are what it is multiplied with, None where nothing is known of them.

    Raises:
        UsageError: the weight or what is made of the rows holds NaN or infinity; ``name`` is told.
    """
    w_NK = w_NK.detach()
    if method == GPTQ and rows is not None and len(rows) >= FEWEST:
        return gptq(w_NK, format, finite_moments(rows.hessian(_as_they_are), name), name)
    squares_K = None
    if method != NEAREST and rows is not None and len(rows):
        squares_K = finite_moments(rows.mean_squares(_as_they_are), name)
    return quantize(w_NK, format, name, search=method != NEAREST, squares_K=squares_K)


def finite_moments(moments: Tensor, name: str) -> Tensor:
    """``moments`` of the rows that reach ``name``.

    Raises:
        UsageError: they hold NaN or infinity.
    """
    if not bool(torch.isfinite(moments).all()):
        raise UsageError(
            f"the rows of calibration= hold or become NaN, infinity or numbers too large to square where they reach "
            f"{name}: leave out the calls that they are of, or give method='search' without calibration="
        )
    return moments


def _as_they_are(rows_MK: Tensor) -> Tensor:
    return rows_MK
