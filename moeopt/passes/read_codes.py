"""Experts whose own code makes floats of codes run in the kernels that read codes.

    row_function(x, ids, weights; codes, scales)  ->  experts(x, ids, weights; scale * (code - zero))

The function of a row holds the dequantisation as calls. Where these give, bit for bit, the floats of a format of
``ir/weight_format``, and what is left is two products with a function of the op's between them, the op reads the
module's own codes and scales, as views: nothing is copied, and no matrix is ever float as a whole. A scale of each
output that stands behind its product counts as one of the codes.

Shapes     a weight (N out, K in) is codes of its size, or half of it, and a scale for each block
Seen in    home-made quantised experts: int8 or packed 4-bit buffers and scales, made float in ``forward``
Saves      the floats of each expert that is hit, made anew at each call: 5.3 ms become 0.4 (int8, 1024 x 1536, a token)
Numerics   ROUNDING: products with codes, whose sums are multiplied by the scale
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moeopt.errors import Declined
from moeopt.ir.coded_function import CodedFunction
from moeopt.ir.row_function import RowFunction
from moeopt.ir.weight_refs import SlotRefs, tensor_at
from moeopt.ops.native.library import library
from moeopt.ops.native.matrices import reads_codes
from moeopt.ops.quantized_weight import zeros_beyond
from moeopt.passes.base import Level
from moeopt.recognise.coded_function import coded_function
from moeopt.rewrite.block_graph import BlockGraph


class ReadCodes:
    """See the module's docstring. ``any_format``: codes that the kernel in C++ does not read too; engines read more."""

    name = "read_codes"
    level = Level.ROUNDING

    def __init__(self, any_format: bool = False) -> None:
        self.any_format = any_format

    def apply(self, block: BlockGraph) -> int:
        """How many ``moeopt::experts`` nodes read codes of the module now.

        Raises:
            Declined: experts are codes, and no kernel here reads them.
        """
        if block.captured is not None:
            return 0
        for index, (_, spec) in enumerate(block.weights):
            found = coded_function(spec) if isinstance(spec, RowFunction) else None
            if found is None:
                continue
            reason = why_no_product(found) if self.any_format else why_no_kernel(found)
            if reason:
                raise Declined(reason)
            if block.root is not None and (reason := _zeros_beyond(block.root, block.weights[index].experts, found)):
                raise Declined(reason)
            block.coded[index] = found
        return len(block.coded)


def _zeros_beyond(root: nn.Module, experts: Sequence[SlotRefs], coded: CodedFunction) -> str:
    """Why the zero points that the module holds are none of the format, a sentence; "" where they are."""
    for matrix in (m for m in coded.matrices if m.zeros is not None):
        for path in dict.fromkeys(ref.slots[matrix.zeros.slot].path for ref in experts if matrix.zeros is not None):
            if beyond := zeros_beyond(tensor_at(root, path), matrix.format):
                return f"{path}: {beyond}, so its codes are of no format"
    return ""


def why_no_product(coded: CodedFunction) -> str:
    """Why nothing multiplies by these codes, here or in an engine, a sentence; "" where something does."""
    if torch.float64 not in (coded.dtype, *(one.format.scale_dtype for one in coded.matrices)):
        return ""
    return "its experts are codes with products or scales in float64, and kernels that read codes have those of 32 bits"


def why_no_kernel(coded: CodedFunction) -> str:
    """Why the kernel in C++ does not read these codes, a sentence; "" where it does."""
    if reason := why_no_product(coded):
        return reason
    if library() is None:
        return "there is no kernel in C++ here, and PyTorch has none that reads codes"
    for one in coded.matrices:
        if not reads_codes(one.format):
            return (
                f"its experts are {one.format}, and the kernel in C++ reads int8 codes, 8-bit codes about 128, and "
                "4-bit codes about 8, low nibble first, with scales for each row and no zero points; an ONNX Runtime "
                "engine takes others too"
            )
        if not one.in_rows:
            return (
                "its experts' codes or scales are stored (in, out), and the kernel in C++ reads the codes of one "
                "output side by side; store the transposed buffers"
            )
    return ""
