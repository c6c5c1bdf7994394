"""What a builder's log says of the engine that it made: its layers, and the memory that it planned.

TensorRT prints them at the level VERBOSE with detailed profiling on. The engine inspector says the same, and needs
a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), .*?Metadata: ?(?P<metadata>.*)$")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_BYTES = re.compile(r"^I: Total (Activation|Weights) Memory: (\d+) bytes")


@dataclass(frozen=True)
class Layer:
    """A layer of a built engine.

    Attributes:
        name, type: as TensorRT calls them, like "gemm" and "kgen".
        nodes: names of the ONNX nodes that it says it computes; a fused layer may say none.
    """

    name: str
    type: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LogFacts:
    """What :func:`read_log` found.

    Attributes:
        layers: of the built engine, in order; empty where the log has no list of them.
        activation_bytes: planned for a context, at the largest sizes of the profile; None where it is not said.
        weights_bytes: of the engine's weights.
    """

    layers: tuple[Layer, ...] = ()
    activation_bytes: int | None = None
    weights_bytes: int | None = None


def read_log(text: str) -> LogFacts:
    """The layers and sizes in a build log."""
    lines = text.split("\n")
    sizes: dict[str, int] = {}
    for line in lines:
        if found := _BYTES.match(line):
            sizes[found.group(1)] = max(int(found.group(2)), sizes.get(found.group(1), 0))
    return LogFacts(tuple(_layers(lines)), sizes.get("Activation"), sizes.get("Weights"))


def counted(layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers of each type, the most frequent first."""
    counts = Counter(layer.type for layer in layers)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


def in_block(layers: Iterable[Layer], block: str) -> list[Layer]:
    """The layers that compute nodes of a block, or are named after one."""
    lead = f"{block}/"
    return [x for x in layers if x.name.startswith(lead) or any(node.startswith(lead) for node in x.nodes)]


def _layers(lines: Sequence[str]) -> Iterable[Layer]:
    for line in lines:
        if found := _LAYER.match(line):
            yield Layer(found["name"], found["type"], tuple(_ONNX.findall(found["metadata"])))
