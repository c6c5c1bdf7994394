"""Experts that an ONNX file holds as codes stay codes; a block whose experts would become floats is declined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from moeopt.backends.onnxrt.onnx_file.parts import FilePart
from moeopt.onnx_in.coded import coded_weights
from moeopt.onnx_in.program import GraphProgram
from moeopt.options import Options, QuantPlan
from moeopt.options.quant_plan import CHECKPOINT
from moeopt.passes.quantize_experts import QuantizeExperts
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.rewrite.store_codes import codes_of
from moeopt.sizes import in_megabytes

_WHY = (
    "the file holds its experts as codes, and they would become floats, several times as large: {}; the block is left "
    "as it is; optimise the file from before it was quantised"
)


def with_codes(options: Options, parts: Sequence[FilePart]) -> Options:
    """``options``, with ``quantize="checkpoint"`` where the file holds the weights of some part as codes."""
    if not any(coded_weights(part.module) for part in parts):
        return options
    return dataclasses.replace(options, quantize=QuantPlan(default=CHECKPOINT))


def rounded_floats(block: nn.Module) -> str:
    """Why ``block`` cannot keep codes: it dequantises them to half precision and casts the result; "" if not."""
    halves = {one.node for one in coded_weights(block) if one.floats.dtype in (torch.float16, torch.bfloat16)}
    program = getattr(block, "program", None)
    if not halves or not isinstance(program, GraphProgram):
        return ""
    casts = [step for step in program.steps if step.op_type == "Cast" and step.inputs[0] in program.constants]
    if not casts:
        return ""
    return (
        f"the node {sorted(halves)[0]!r} rounds what the codes stand for to half precision, and a Cast widens it again"
        ", which experts of codes do not do (store the scales in the precision that the file computes in)"
    )


def keep_codes(twin: nn.Module, outcome: PipelineResult) -> None:
    """Decline each block whose experts cannot keep their codes; note which other weights became floats."""
    lost = {
        record.block: record.reason
        for record in outcome.passes
        if record.name == QuantizeExperts.name and record.reason and record.block in outcome.rewrites
    }
    for name in lost:
        if rounded := rounded_floats(twin.get_submodule(name)):
            lost[name] = rounded
        del outcome.rewrites[name]
    outcome.checks[:] = [check for check in outcome.checks if check.name not in lost]
    outcome.blocks = [
        dataclasses.replace(b, status="declined", reason=_WHY.format(lost[b.name]), lowering="")
        if b.name in lost
        else b
        for b in outcome.blocks
    ]
    blocks = [twin.get_submodule(name) for name in outcome.rewrites]
    floats = sum(one.floats.nbytes for block in blocks for one in coded_weights(block))
    floats -= sum(bank.float_bytes for block in blocks for bank in codes_of(block))
    if floats > 0:
        outcome.notes.append(
            f"{in_megabytes(floats)} of floats stand where blocks had other weights as codes (routers, shared "
            "experts): only routed experts keep theirs"
        )
