"""FLOPs and bytes of one pass over T tokens, what bounds each part, and from which T on compute does.

For a part of P parameters that every token uses (w bytes each), and for experts (E of P / E parameters, K a token):

    FLOPs   2 P T                               2 (P / E) K T
    bytes   P w + rows                          (P / E) w hit(T) + rows
    hit(T) = E (1 - (1 - K / E) ** T)           distinct experts that T tokens reach, if routing is uniform

``rows`` are the inputs and outputs of the products, at 2 bytes. Time is at least max(FLOPs / peak, bytes / bandwidth);
the part is bound by compute where the first is larger. Attention scores and the KV cache, which depend on the length of
the context, are not in it; nor is what travels between devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeopt.inspection.counting import PARTS
from moeopt.inspection.devices import Device
from moeopt.inspection.roles import Roles
from moeopt.inspection.structure import MoEBlock
from moeopt.inspection.tree import Tree

ROW_BYTES = 2
LARGEST = 1 << 24
"""Tokens up to which a turning point is looked for."""


def expected_hit(experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts that ``tokens`` tokens reach: E (1 - (1 - K/E) ** T), routing uniform and independent."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


@dataclass
class Part:
    """Work of one part of the model: sums over its matrices, all layers together.

    Attributes:
        always: parameters that each token uses.
        row: elements that the products of one token read and write.
        banks: (parameters, E, K, elements of rows per token) of each bank of experts.
    """

    name: str
    always: int = 0
    row: int = 0
    banks: list[tuple[int, int, int, int]] | None = None

    def flops(self, tokens: int) -> float:
        routed = sum(p / e * k for p, e, k, _ in self.banks or ())
        return 2.0 * tokens * (self.always + routed)

    def bytes(self, tokens: int, width: float) -> float:
        weights = self.always + sum(p / e * expected_hit(e, k, tokens) for p, e, k, _ in self.banks or ())
        rows = self.row + sum(r for *_, r in self.banks or ())
        return width * weights + float(ROW_BYTES * rows * tokens)


@dataclass(frozen=True)
class PartTime:
    """A part at T tokens on a device: ``turns_at`` is the least T that compute bounds; None: no T does."""

    name: str
    flops: float
    bytes: float
    seconds: float
    by: str
    turns_at: int | None


def parts_of(tree: Tree, blocks: list[MoEBlock], roles: Roles, top_k: dict[str, int | None]) -> list[Part]:
    """The parts that a text token passes, in the order of ``PARTS``; experts without a known K are left out."""
    found: dict[str, Part] = {}
    for name, tensor in tree.tensors.items():
        role = roles.of[name]
        if role in ("experts", "embedding", "elsewhere") or tensor.dim() < 2:
            continue
        part = found.setdefault(role, Part(role))
        part.always += tensor.numel()
        part.row += sum(tensor.shape[-2:])
    for block in blocks:
        chosen = top_k[block.path]
        if chosen is None:
            continue
        size = sum(tree.tensors[n].numel() for n in block.bank.names)
        ffn = block.bank.ffn
        row = chosen * (2 * ffn.hidden + (3 if ffn.gated else 2) * ffn.inner)
        part = found.setdefault("experts", Part("experts", banks=[]))
        assert part.banks is not None
        part.banks.append((size, block.bank.choices, chosen, row))
    return [found[name] for name in PARTS if name in found]


@dataclass(frozen=True)
class ForwardPass:
    """One forward of ``tokens`` tokens; ``hit`` is how many distinct experts of a layer it reaches, as expected."""

    tokens: int
    parts: list[PartTime]
    hit: float | None

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """FLOPs and bytes per token; seconds for the whole pass."""
        parts = {
            p.name: {"flops": p.flops / self.tokens, "bytes": p.bytes / self.tokens, "seconds": p.seconds,
                     "bound_by": p.by, "compute_bound_from_tokens": p.turns_at}
            for p in self.parts
        }  # fmt: skip
        flops, moved = (sum(p[k] for p in parts.values()) for k in ("flops", "bytes"))  # type: ignore[misc]
        return {"tokens": self.tokens, "flops": flops, "bytes": moved, "seconds_at_least": self.seconds,
                "experts_hit": self.hit, "parts": parts}  # fmt: skip


def bound(part: Part, tokens: int, width: float, device: Device) -> PartTime:
    """``width`` is the bytes of one weight."""
    flops, moved = part.flops(tokens), part.bytes(tokens, width)
    compute, memory = flops / device.flops, moved / device.bandwidth
    return PartTime(
        part.name, flops, moved, max(compute, memory), "compute" if compute > memory else "bandwidth",
        _turns_at(part, width, device.ridge),
    )  # fmt: skip


def _turns_at(part: Part, width: float, ridge: float) -> int | None:
    """FLOPs per byte grow with the tokens, so bisection finds the first T at which they pass the ridge."""

    def intense(tokens: int) -> bool:
        return part.flops(tokens) > ridge * part.bytes(tokens, width)

    if not intense(LARGEST):
        return None
    low, high = 0, LARGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if intense(middle) else (middle, high)
    return high
