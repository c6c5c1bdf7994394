"""How weights are stored: what a code means, which codes share a scale, and how codes lie in bytes.

    w[n, k] = (value(code[n, k]) - zero[b]) * scale[b]        b = the block that (n, k) lies in

Shape legend: a weight is (N out, K in); a block is (rows, columns), where None is the whole dimension, so ``(1, None)``
is one scale for each output channel and ``(1, 32)`` one for each 32 weights of a row. Blocks at the edges may be
partial.

    codes    meaning of a code                      stored as          zero point where the format is symmetric
    int8     the number itself                      int8               0
    uint8    the number itself                      uint8              128
    uint4    the number itself, 0 to 15             two in a uint8     8
    e4m3     an 8-bit float (OCP FP8, no infinity)  float8_e4m3fn      0
    e2m1     a 4-bit float: 0 .5 1 1.5 2 3 4 6, +-  two in a uint8     0
    nf4      an entry of QLoRA's NormalFloat table  two in a uint8     0
    fp4      an entry of bitsandbytes' table        two in a uint8     0
    float32, float16, bfloat16, float64             that dtype         no scale at all

A scale is a float, or ``e8m0``: the uint8 s that means 2^(s - 127) (OCP Microscaling, version 1.0).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from moeopt.errors import BundleError, UsageError
from moeopt.untrusted import parse_json

Block = tuple[int | None, int | None]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Table of the QLoRA paper (Dettmers et al. 2023), in float32, as bitsandbytes has it."""
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
"""0, 1/16, 8, 12, 4, 6, 2 and 3, divided by 12 in float32, as bitsandbytes 0.50 has them; its ninth code is 0 again."""

NIBBLES: dict[str, tuple[float, ...]] = {
    "uint4": tuple(float(i) for i in range(16)),
    "e2m1": (*_E2M1, *(-v for v in _E2M1)),
    "nf4": _NF4,
    "fp4": (*_FP4, 0.0, *(-v for v in _FP4[1:])),
}
"""What each of the 16 codes of a 4-bit kind means."""

_DTYPES = {
    "int8": torch.int8, "uint8": torch.uint8, "uint4": torch.uint8, "e4m3": torch.float8_e4m3fn, "e2m1": torch.uint8,
    "nf4": torch.uint8, "fp4": torch.uint8, "float64": torch.float64, "float32": torch.float32,
    "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
_LARGEST = {"int8": 128.0, "uint8": 128.0, "uint4": 8.0, "e4m3": 448.0, "e2m1": 6.0, "nf4": 1.0,
            "fp4": 1.0}  # fmt: skip
_SCALES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
    "e8m0": torch.uint8,
}  # fmt: skip
_MAX = 1 << 31


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a weight; see the module's docstring.

    Args:
        name: what users call it.
        codes: what a code means, and in which dtype codes are held.
        block: (rows, columns) that share a scale; None is the whole dimension.
        scale: dtype of the scales; ignored where ``codes`` is a float dtype.
        symmetric: whether the zero point is that of the table above; else each block has one, as a tensor.
        packing: which nibble of a byte is the first weight's, where codes have 4 bits.

    Raises:
        UsageError: a field has no such value; the message names it.
    """

    name: str
    codes: str
    block: Block = (1, None)
    scale: str = "float32"
    symmetric: bool = True
    packing: Literal["low nibble first", "high nibble first"] = "low nibble first"

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("codes", self.codes, tuple(_DTYPES)),
            ("scale", self.scale, tuple(_SCALES)),
            ("packing", self.packing, ("low nibble first", "high nibble first")),
        ):
            if value not in choices:
                raise UsageError(f"WeightFormat.{field} is {value!r:.60}; it must be one of {', '.join(choices)}")
        ok = isinstance(self.block, tuple) and len(self.block) == 2
        if not ok or any(b is not None and (type(b) is not int or not 1 <= b < _MAX) for b in self.block):
            raise UsageError(
                f"WeightFormat.block is {self.block!r:.60}; it must be (rows, columns), each a positive integer or "
                "None for the whole dimension"
            )
        if not isinstance(self.name, str) or type(self.symmetric) is not bool:
            raise UsageError(f"WeightFormat {self.name!r:.60}: the name must be a word and symmetric True or False")
        if not self.symmetric and self.codes not in ("int8", "uint8", "uint4"):
            raise UsageError(f"WeightFormat.symmetric is False; codes {self.codes!r} are floats and have no zero point")

    @property
    def is_float(self) -> bool:
        """Whether weights are held as they are, without scales."""
        return self.codes in ("float64", "float32", "float16", "bfloat16")

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.codes in NIBBLES

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.packed else 8 * self.code_dtype.itemsize

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of the tensor of codes."""
        return _DTYPES[self.codes]

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the tensor of scales; uint8 where they are ``e8m0``."""
        return _SCALES[self.scale]

    @property
    def zero(self) -> int:
        """The zero point of a symmetric format."""
        return {"uint8": 128, "uint4": 8}.get(self.codes, 0)

    @property
    def largest(self) -> float:
        """The largest magnitude of a code less a symmetric zero point; 1 where weights are held as they are."""
        return _LARGEST.get(self.codes, 1.0)

    def code_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the codes of an (N, K) weight."""
        return shape[0], -(-shape[1] // 2) if self.packed else shape[1]

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the scales of an (N, K) weight, and of its zero points."""
        rows, columns = (1 if b is None else -(-n // b) for n, b in zip(shape, self.block, strict=True))
        return rows, columns

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of codes, scales and zero points of an (N, K) weight."""
        total = math.prod(self.code_shape(shape)) * self.code_dtype.itemsize
        if self.is_float:
            return total
        each = self.scale_dtype.itemsize + (0 if self.symmetric else self.code_dtype.itemsize)
        return total + math.prod(self.scale_shape(shape)) * each

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """:meth:`nbytes` in bits, for each of the N K weights."""
        return 8 * self.nbytes(shape) / max(math.prod(shape), 1)

    def encode(self) -> str:
        """A compact JSON string with every field."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> WeightFormat:
        """The inverse of :meth:`encode`; anything else is a ``UsageError``."""
        try:
            return cls.of(parse_json(text, "the weight format"))
        except BundleError as err:
            raise UsageError(f"not a WeightFormat: {text!r:.200} ({err})") from err

    @classmethod
    def of(cls, fields: object) -> WeightFormat:
        """The format whose fields are ``fields``, as JSON has them; anything else is a ``UsageError``."""
        if not isinstance(fields, dict) or not {"name", "codes"} <= set(fields):
            raise UsageError(f"not a WeightFormat: {fields!r:.200} (it lacks a name or codes)")
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UsageError(f"WeightFormat has no field {unknown[0]!r:.60}: written by a newer moeopt?")
        words = cast("dict[str, Any]", dict(fields))
        if isinstance(words.get("block"), list):
            words["block"] = tuple(words["block"])
        for field in ("codes", "scale", "packing"):
            if not isinstance(words.get(field, ""), str):
                raise UsageError(f"WeightFormat.{field} is {words[field]!r:.60}; it must be a word")
        return cls(**words)

    def __str__(self) -> str:
        if self.is_float:
            return self.name
        rows, columns = self.block
        where = f"{rows or 'all'} x {columns or 'all'}"
        if columns is None and rows in (1, None):
            where = "channel" if rows else "tensor"
        zero = "" if self.symmetric else ", zero points"
        return f"{self.name} ({self.codes}, one {self.scale} scale per {where}{zero})"


def _float(name: str) -> WeightFormat:
    return WeightFormat(name, name, (None, None))


FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = map(_float, ("float64", "float32", "float16", "bfloat16"))
INT8_CHANNEL, UINT8_CHANNEL = WeightFormat("int8", "int8"), WeightFormat("uint8", "uint8")
INT8_BLOCK16, INT8_BLOCK32, INT8_BLOCK64, INT8_BLOCK128 = (
    WeightFormat(f"int8-block{n}", "int8", (1, n), "bfloat16") for n in (16, 32, 64, 128)
)
INT4_CHANNEL = WeightFormat("int4-channel", "uint4")
INT4_BLOCK16, INT4_BLOCK32, INT4_BLOCK64, INT4_BLOCK128 = (
    WeightFormat("int4" if n == 32 else f"int4-block{n}", "uint4", (1, n), "bfloat16") for n in (16, 32, 64, 128)
)
INT4_ASYMMETRIC32, INT4_ASYMMETRIC128 = (
    WeightFormat(f"int4-asymmetric{n}", "uint4", (1, n), "bfloat16", symmetric=False) for n in (32, 128)
)
INT8_ASYMMETRIC32 = WeightFormat("int8-asymmetric32", "uint8", (1, 32), "bfloat16", symmetric=False)
FP8_CHANNEL = WeightFormat("fp8-channel", "e4m3")
FP8_BLOCK128 = WeightFormat("fp8", "e4m3", (128, 128))
MXFP4 = WeightFormat("mxfp4", "e2m1", (1, 32), "e8m0")
NF4_BLOCK64 = WeightFormat("nf4", "nf4", (1, 64), packing="high nibble first")

FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        FLOAT64, FLOAT32, FLOAT16, BFLOAT16, INT8_CHANNEL, INT8_BLOCK16, INT8_BLOCK32, INT8_BLOCK64, INT8_BLOCK128,
        INT4_CHANNEL, INT4_BLOCK16, INT4_BLOCK32, INT4_BLOCK64, INT4_BLOCK128, INT4_ASYMMETRIC32, INT4_ASYMMETRIC128,
        INT8_ASYMMETRIC32, FP8_CHANNEL, FP8_BLOCK128, MXFP4, NF4_BLOCK64,
    )
}  # fmt: skip
"""The predefined formats by name."""
