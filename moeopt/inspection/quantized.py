"""What quantising the experts would make of a model: bytes, what fits where, and the bound of a decoding step.

    bytes = sum over experts of (codes + scales + zero points) + the rest at its width

Sizes are exact, scales and partial blocks counted; nothing is quantised. Shape legend: H hidden, I inner width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moeopt.errors import UsageError
from moeopt.inspection.devices import Device
from moeopt.inspection.memory import Fit, fit
from moeopt.inspection.roofline import ForwardPass, Part, bound
from moeopt.inspection.structure import MoEBlock
from moeopt.inspection.tree import Tree
from moeopt.ir.weight_format import FORMATS, WeightFormat

NAMES = tuple(name for name, format in FORMATS.items() if not format.is_float)


@dataclass(frozen=True)
class QuantizedSizes:
    """The experts in one format, the rest as it is.

    Attributes:
        format: of the experts' matrices.
        experts: bytes of the experts, their biases included.
        before: bytes of the experts at the inspection's width.
        bits_per_weight: of the experts, scales included.
        memory: the whole model on the device.
        decode: a decoding step.
    """

    format: WeightFormat
    experts: int
    before: int
    bits_per_weight: float
    memory: Fit
    decode: ForwardPass

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": self.format.name, "experts_bytes": self.experts, "experts_bytes_before": self.before,
            "bits_per_weight": self.bits_per_weight, "memory": {"bytes": self.memory.bytes, **self.memory.to_dict()},
            "decode": self.decode.to_dict(),
        }  # fmt: skip


def format_named(name: str) -> WeightFormat:
    """The format of that name.

    Raises:
        UsageError: there is none; the message lists them.
    """
    if name not in NAMES:
        raise UsageError(f"quantize={name!r:.60} is no format of experts: use one of {', '.join(NAMES)}")
    return FORMATS[name]


def quantized_sizes(
    tree: Tree, blocks: list[MoEBlock], format: WeightFormat, bits: int, total: int, parts: list[Part],
    decode: ForwardPass, device: Device,
) -> QuantizedSizes:  # fmt: skip
    """The sizes of the model whose experts are in ``format``; ``total`` parameters in all, of ``bits`` bits.

    Raises:
        UsageError: the model has no experts.
    """
    if not blocks:
        raise UsageError("quantize= is for experts, and no mixture of experts was found: leave it out, or give bits=")
    size = parameters = 0
    for block in blocks:
        held, matrices, coded = _sizes(tree, block, format)
        parameters += held
        size += coded + (held - matrices) * bits // 8
    rest = (total - parameters) * bits // 8
    width = 8 * size / max(parameters, 1)
    tokens = decode.tokens
    times = [bound(p, tokens, (width if p.name == "experts" else bits) / 8, device) for p in parts]
    return QuantizedSizes(
        format, size, parameters * bits // 8, width, fit(bits, size + rest, device), replace(decode, parts=times)
    )


def _sizes(tree: Tree, block: MoEBlock, format: WeightFormat) -> tuple[int, int, int]:
    """Parameters of a bank, those of its matrices, and the bytes of the matrices in ``format``."""
    ffn, experts = block.bank.ffn, block.bank.experts
    held = sum(tree.tensors[n].numel() for n in block.bank.names)
    into = [(ffn.inner, ffn.hidden)] * (2 if ffn.gated else 1)
    shapes = [*into, (ffn.hidden, ffn.inner)]
    matrices = experts * sum(n * k for n, k in shapes)
    return held, min(matrices, held), experts * sum(format.nbytes(shape) for shape in shapes)
