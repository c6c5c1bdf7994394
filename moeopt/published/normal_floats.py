"""bitsandbytes' 4-bit weights: codes of one of two tables in one column, a scale for 64 of them, its scales in 8 bits.

    X.weight u8 (N K / 2, 1)                         codes, the first in the high half
    X.weight.quant_state.bitsandbytes__nf4 u8        or __fp4; JSON: shape [N, K], blocksize, and with scales of
                                                     scales also nested_blocksize and nested_offset
    X.weight.absmax                                  a scale of each block, float32; or u8 into nested_quant_map, times
                                                     nested_absmax of its own block, plus nested_offset
    X.weight.quant_map (16)                          the table

Scales of scales are multiplied out, in float32 as bitsandbytes does it: half a bit a weight. Source: ``QuantState`` and
``dequantize_4bit`` of bitsandbytes 0.50. Shape legend: N out, K in.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import CheckpointError
from moeopt.ir.weight_format import NIBBLES, WeightFormat
from moeopt.published.integer_packings import UnreadLayout
from moeopt.published.stored_matrix import CodeTensors, StoredMatrix
from moeopt.published.tensor_files import TensorFiles
from moeopt.value_types import JsonValue

STATE = ".quant_state.bitsandbytes__"
"""What the name of a matrix goes on with in the name of its state; "nf4" or "fp4" follows."""
_SCALES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)


def normal_floats(files: TensorFiles, weight: str) -> StoredMatrix:
    """The matrix whose codes are the tensor ``weight``.

    Raises:
        UnreadLayout: its table or its sizes are none that are read.
        CheckpointError: what its state says does not fit the tensors beside it.
    """
    state = _state(files, weight)
    shape: JsonValue = state.get("shape")
    block: JsonValue = state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in [*shape, block]):
        raise UnreadLayout(f"{weight} is of {shape} in blocks of {block}; matrices are read")
    N, K = shape
    if K % block or block % 2:
        raise UnreadLayout(f"the blocks of {block} of {weight} go over the ends of its rows of {K}")
    absmax, table, blocks = f"{weight}.absmax", f"{weight}.quant_map", N * K // block
    counts = {weight: N * K // 2, absmax: blocks, table: 16}
    nested = state.get("nested_blocksize")
    if nested is not None:
        if type(nested) is not int or nested < 1 or not isinstance(state.get("nested_offset"), (int, float)):
            raise CheckpointError(f"{_named(files, weight)} has no sizes of scales of scales: fetch the file again")
        counts |= {f"{weight}.nested_absmax": -(-blocks // nested), f"{weight}.nested_quant_map": 256}
    for name, count in counts.items():
        dtype = files.dtype(name) if name in files else None
        each = dtype.itemsize if dtype is not None and name == weight else 1  # codes lie in numbers of any dtype
        held = math.prod(files.shape(name)) * each if dtype is not None else 0
        if held != count:
            raise CheckpointError(
                f"{name} has {held} numbers, and {weight} of {N} x {K} in blocks of {block} needs {count}: a file is "
                "missing or of another version; fetch the files again"
            )
    if (files.dtype(absmax) == torch.uint8) != (nested is not None) or files.dtype(absmax) not in _SCALES:
        raise CheckpointError(
            f"{absmax} is {files.dtype(absmax)}, which {_named(files, weight)} says nothing of: fetch both again"
        )
    kind = _named(files, weight).removeprefix(weight + STATE)
    if files.tensor(table).float().tolist() != list(NIBBLES[kind]):
        raise UnreadLayout(f"{table} is another table than {kind}'s")
    format = WeightFormat(f"{kind}-block{block}", kind, (1, block), "float32", packing="high nibble first")

    def load() -> CodeTensors:
        codes = files.tensor(weight).reshape(-1).view(torch.uint8).reshape(N, K // 2)
        scales = files.tensor(absmax) if nested is None else _multiplied_out(files, weight, state)
        return codes, scales.float().reshape(N, K // block), None

    tensors = (*counts, _named(files, weight))
    return StoredMatrix(weight.removesuffix(".weight"), None, (N, K), format, load, tensors)


def _named(files: TensorFiles, weight: str) -> str:
    return next(f"{weight}{STATE}{kind}" for kind in ("nf4", "fp4") if f"{weight}{STATE}{kind}" in files)


def _state(files: TensorFiles, weight: str) -> dict[str, Any]:
    name = _named(files, weight)
    try:
        said = json.loads(bytes(files.tensor(name).tolist()))
    except (ValueError, TypeError) as err:  # the second: its numbers are no bytes
        raise CheckpointError(f"{name} is no JSON ({err}): fetch the file again") from None
    if not isinstance(said, dict):
        raise CheckpointError(f"{name} says {said!r:.60}, and not what the codes of {weight} are: fetch the file again")
    return said


def _multiplied_out(files: TensorFiles, weight: str, state: dict[str, Any]) -> Tensor:
    """Scales that are codes of 8 bits themselves, as float32."""
    codes, of_codes, table = (files.tensor(f"{weight}.{p}") for p in ("absmax", "nested_absmax", "nested_quant_map"))
    wide = of_codes.float().repeat_interleave(state["nested_blocksize"])[: codes.numel()]
    scales: Tensor = table.float()[codes.flatten().long()] * wide
    return scales + float(state["nested_offset"])
