"""Bytes of a weight in the formats that checkpoints have, scales included."""

from __future__ import annotations

from dataclasses import dataclass

from moeopt.errors import UsageError


@dataclass(frozen=True)
class Format:
    """Bytes of a weight of an expert and of the rest, and the factor on the device's 16-bit compute."""

    name: str
    experts: float
    rest: float
    compute: float


FORMATS = {
    f.name: f
    for f in (
        Format("float32", 4.0, 4.0, 0.5),
        Format("bfloat16", 2.0, 2.0, 1.0),
        Format("float16", 2.0, 2.0, 1.0),
        # one float32 scale for each 128 x 128 block, as DeepSeek-V3 is published
        Format("fp8", 1.0 + 4 / 128**2, 1.0 + 4 / 128**2, 2.0),
        # one 8-bit scale for each 32 weights of an expert, as GPT-OSS is published; the rest stays bfloat16
        Format("int4", 0.5 + 1 / 32, 2.0, 1.0),
    )
}
_ALSO = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float8": "fp8", "mxfp4": "int4", "w4": "int4"}


def find_format(dtype: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: there is none; the message lists them.
    """
    name = str(dtype).removeprefix("torch.").lower()
    name = _ALSO.get(name, name)
    if name not in FORMATS:
        raise UsageError(f"dtype={dtype!r} is not known to plan; use one of {', '.join(FORMATS)}")
    return FORMATS[name]
