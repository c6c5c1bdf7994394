"""Mixtures of a file that no region shows: the whole graph is read as a module, as ``moeopt.from_onnx`` gives it.

Regions are cut around chains of products with weights. Rows of a memory, vectors, masked neurons and rows that are
weighed before they meet a whole stack have no such chains; a reader of modules finds them, and says what they are.
Nothing of them is rewritten here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moeopt.errors import MoeoptError
from moeopt.onnx_in.feeds import GraphFeeds
from moeopt.onnx_in.read import OnnxFile
from moeopt.onnx_in.regions import CandidateRegion
from moeopt.onnx_in.whole_file import InterpretedFile, interpreted
from moeopt.options import Options
from moeopt.pipeline.pays import TAKEN
from moeopt.pipeline.run import run
from moeopt.report import BlockReport
from moeopt.untrusted import shown_line

_MOST_NODES = 20_000
"""Nodes of a graph that is run and read once more: a model of a hundred layers."""
_CHOICES = {"TopK", "ArgMax", "ArgMin", "Softmax", "Hardmax", "Greater", "GreaterOrEqual", "Sigmoid"}
_CODES = {"DequantizeLinear", "MatMulNBits"}
_NOT_LOOKED_FOR = "mixtures other than pairs of products were not looked for"
_AS_A_MODULE = (
    "in a file, blocks are cut out around products that each expert has for its own, from the same rows to one sum, "
    "and its experts have no such products (one may be shared by all of them); read as a module it can be rewritten: "
    "moeopt.optimize(moeopt.from_onnx(path), inputs, backend='onnxruntime')"
)


def blocks_beside_regions(
    file: OnnxFile, feeds: GraphFeeds, regions: Sequence[CandidateRegion], options: Options
) -> tuple[list[BlockReport], list[str]]:
    """An entry for each mixture of the graph outside of the ``regions``; and a note where they were not looked for:
    the graph has no form as a module, or has too many nodes.

    Args:
        feeds: inputs that the file runs on.
        regions: those that the report has entries for.
    """
    nodes = list(file.model.graph)
    ops = {node.op_type for node in nodes}
    given = {value.name for value in file.proto.graph.input}
    replaceable = any(tensor.name in given for tensor in file.proto.graph.initializer)  # a note says so already
    if ops.isdisjoint(_CHOICES) or replaceable:
        return [], []
    if len(nodes) > _MOST_NODES:
        many = (
            f"{_NOT_LOOKED_FOR}: the graph has {len(nodes)} nodes, and one of more than {_MOST_NODES} is not run and "
            "read once more; moeopt.explain(moeopt.from_onnx(path), inputs) looks for them in a graph of any size"
        )
        return [], [many]
    if not ops.isdisjoint(_CODES):  # each would be made floats a second time
        return [], [] if regions else [f"{_NOT_LOOKED_FOR} among weights that are codes"]
    options.say("looking for mixtures that are no chains of products")
    try:
        module = interpreted(file, dict(feeds))
        known = {id(p) for region in regions for p in _weights(module, region)}
        dry = dataclasses.replace(options, verify="fast", quantize=None, dense="leave", dump=None)
        call = (), {name: torch.as_tensor(value) for name, value in feeds.items()}
        blocks = run(module, call, dry, known=known).blocks
    except MoeoptError as err:
        note = f"{_NOT_LOOKED_FOR}: {shown_line(err)[:400]}"
        return [], [] if ops.isdisjoint({"TopK", "ArgMax", "ArgMin"}) else [note]
    found = [block for block in blocks if block.kind == "moe"]
    return [_in_the_file(block, f"mixture_{number}") for number, block in enumerate(found)], []


def _weights(module: InterpretedFile, region: CandidateRegion) -> Iterator[Tensor]:
    """The weights of a region, which is a child of the module where its results come together near it."""
    children = dict(module.named_modules())
    if region.name in children:
        yield from children[region.name].parameters()
    held = module.program.constants
    names = {product.weight.name for product in region.chains.products}
    yield from (getattr(module, held[name]) for name in names if name in held)


def _in_the_file(block: BlockReport, name: str) -> BlockReport:
    if block.status == "rewritten" or block.reason.endswith(TAKEN):
        return BlockReport(name, "moe", "declined", _AS_A_MODULE, block.experts)
    return dataclasses.replace(block, name=name, source="", obstacles=())
