"""The report on a file: its blocks in the graph's order, with reasons for who has no code at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from moeopt.backends.onnxrt.onnx_file.parts import FilePart, FileParts
from moeopt.onnx_in.read import OnnxFile
from moeopt.recognise.product_of_all import ONE_MATRIX_EACH
from moeopt.report import BlockReport
from moeopt.untrusted import shown_line

Home = TypeVar("Home")
IN_A_FILE = (
    "who has only the file: export the model with another form of its experts (all experts on all tokens; "
    "transformers: experts_implementation='batched_mm'), or optimise the PyTorch model"
)
UNREACHED = "no probe token reached"
"""What reasons say where the example's few rows, or samples, chose too few of the experts."""
_CODES = "the file holds its experts as codes"
_OF_NO_CODE = ("skipped:", "left as it is", "it was rewritten, compared and reverted", ONE_MATRIX_EACH, _CODES)
"""How reasons begin that another export would not change."""


def decline(parts: FileParts, blocks: Sequence[BlockReport]) -> None:
    """Enter the reason of each block that was not rewritten for the part of the file that it is in."""
    by_name = {part.name: part for part in parts.parts}
    for block in map(_for_the_owner_of_a_file, blocks):
        home = _home(block.name, by_name)
        if home is not None:
            parts.declined.setdefault(home.name, (home.candidate, block.reason or "it was not rewritten"))


def inner_values(parts: FileParts) -> set[str] | None:
    """The values that the regions of declined candidates make; None where one of them has no region."""
    candidates = [candidate for candidate, _ in parts.declined.values()]
    if not all(candidate.regions for candidate in candidates):
        return None
    return {str(v.name) for c in candidates for region in c.regions for node in region.nodes for v in node.outputs}


def in_order(
    file: OnnxFile, blocks: Sequence[BlockReport], parts: FileParts, names: Sequence[str]
) -> list[BlockReport]:
    """The report's blocks in the graph's order, declined candidates among them, each with its place in the file."""
    found: dict[str, list[BlockReport]] = {name: [] for name in names}
    own = {name: name for name in names}
    for block in blocks:
        block = _for_the_owner_of_a_file(block)
        found.setdefault(_home(block.name, own) or block.name, []).append(block)
    for name, (candidate, reason) in parts.declined.items():
        if not any(b.kind == "moe" for b in found[name]):
            found[name].append(BlockReport(name, "moe", "declined", reason, candidate.chains.experts))
    for part in parts.parts:
        if not any(b.kind == "moe" for b in found[part.name]):
            found[part.name].append(_not_read(part))
    where = {part.name: _place(file, part) for part in parts.parts}
    return [
        dataclasses.replace(block, source=where.get(name, "")) for name, several in found.items() for block in several
    ]


def _not_read(part: FilePart) -> BlockReport:
    first = part.candidate.chains.products[0].node
    reason = (
        f"no experts were read in its {part.candidate.chains.experts} chains of products (the node {first.name!r}, "
        f"{first.op_type}, and its like): what stands between the products, or picks their results, is not followed"
    )
    return _for_the_owner_of_a_file(BlockReport(part.name, "moe", "declined", reason, part.candidate.chains.experts))


def _home(name: str, homes: Mapping[str, Home]) -> Home | None:
    """What stands at a module path, or at the nearest above it."""
    while name and name not in homes:
        name = name.rpartition(".")[0]
    return homes.get(name)


def _for_the_owner_of_a_file(block: BlockReport) -> BlockReport:
    """A reason that speaks of code, with what can be done who has the file alone."""
    if block.kind != "moe" or block.status != "declined" or block.reason.startswith(_OF_NO_CODE):
        return block
    return dataclasses.replace(block, reason=f"{block.reason}; {IN_A_FILE}")


def _place(file: OnnxFile, part: FilePart) -> str:
    nodes = part.region.nodes
    return f"{Path(file.name).name}, {len(nodes)} nodes up to {nodes[-1].name or nodes[-1].op_type!r}"


def replaceable_note(file: OnnxFile) -> list[str]:
    """A note where weights are inputs too: what a caller may replace is no constant, and no expert is sought in it."""
    inputs = {value.name for value in file.proto.graph.input}
    names = [tensor.name for tensor in file.proto.graph.initializer if tensor.name in inputs]
    if not names:
        return []
    return [
        f"weights that are inputs of the graph too ({len(names)}, {shown_line(names[0])!r} first) may be replaced at a "
        "call, so no experts are sought among them: export with keep_initializers_as_inputs=False, or take them out of "
        "graph.input"
    ]
