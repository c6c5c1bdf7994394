"""The report on a file: its blocks in the graph's order, with reasons for who has no code at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moeopt.backends.onnxrt.onnx_file.parts import FilePart, FileParts
from moeopt.onnx_in.read import OnnxFile
from moeopt.report import BlockReport

IN_A_FILE = (
    "who has only the file: export the model with another form of its experts (all experts on all tokens; "
    "transformers: experts_implementation='batched_mm'), or optimise the PyTorch model"
)
_OF_NO_CODE = ("skipped:", "left as it is", "it was rewritten, compared and reverted")
"""How reasons begin that another export would not change."""


def decline(parts: FileParts, block: BlockReport) -> None:
    block = _for_the_owner_of_a_file(block)
    for part in parts.parts:
        if part.name == block.name or block.name.startswith(f"{part.name}."):
            parts.declined.setdefault(part.name, (part.candidate, block.reason or "it was not rewritten"))


def in_order(
    file: OnnxFile, blocks: Sequence[BlockReport], parts: FileParts, names: Sequence[str]
) -> list[BlockReport]:
    """The report's blocks in the graph's order, declined candidates among them, each with its place in the file."""
    found: dict[str, list[BlockReport]] = {name: [] for name in names}
    for block in blocks:
        block = _for_the_owner_of_a_file(block)
        found.setdefault(
            next((n for n in names if block.name == n or block.name.startswith(f"{n}.")), block.name), []
        ).append(block)
    for name, (candidate, reason) in parts.declined.items():
        if not any(b.kind == "moe" for b in found[name]):
            found[name].append(BlockReport(name, "moe", "declined", reason, candidate.chains.experts))
    where = {part.name: _place(file, part) for part in parts.parts}
    return [
        dataclasses.replace(block, source=where.get(name, "")) for name, several in found.items() for block in several
    ]


def _for_the_owner_of_a_file(block: BlockReport) -> BlockReport:
    """A reason that speaks of code, with what can be done who has the file alone."""
    if block.kind != "moe" or block.status != "declined" or block.reason.startswith(_OF_NO_CODE):
        return block
    return dataclasses.replace(block, reason=f"{block.reason}; {IN_A_FILE}")


def _place(file: OnnxFile, part: FilePart) -> str:
    nodes = part.region.nodes
    return f"{Path(file.name).name}, {len(nodes)} nodes up to {nodes[-1].name or nodes[-1].op_type!r}"
