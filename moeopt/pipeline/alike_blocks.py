"""Blocks that are the same code over other weights: recognised once, bound to each, and each verified.

A model of sixty layers has one kind of block sixty times. What a block's three recorded calls showed holds for a
block that is alike in everything but the values of its Parameters (``capture.alike`` compares them part by part), so
its graph is bound to the next such block without recording that one. This is a proposal only: everything that a
rewritten block watches for must be as it was, and the block is verified as any other, against its own code in float64
on adversarial routing. Where any of this fails, the block is recorded and read as if no other had been.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moeopt.capture.alike import unlike
from moeopt.capture.call_roles import CallSpec
from moeopt.control_flow.routing_branches import RoutingBranches
from moeopt.errors import Declined
from moeopt.passes.base import PassRecord
from moeopt.passes.manager import Result
from moeopt.passes.quantize_experts import QuantizeExperts
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router import RouterReading
from moeopt.rewrite.block_graph import BlockGraph
from moeopt.rewrite.install import BlockProgram, RewrittenForward
from moeopt.value_types import PyObject
from moeopt.verification.results import BlockCheck


@dataclass
class Known:
    """A block that was recorded, read and verified: what the next one may be bound to."""

    module: nn.Module
    call_spec: CallSpec
    program: BlockProgram
    found: list[Recognition]
    routers: list[RouterReading]
    passes: Result


@dataclass
class Bound:
    """A known block's graph, bound to an alike block; it answers what verification asks of a ``Capture``."""

    name: str
    module: nn.Module
    call_spec: CallSpec
    known: Known
    branches: RoutingBranches = field(default_factory=RoutingBranches)

    @property
    def found(self) -> list[Recognition]:
        return self.known.found

    def program(self, block: BlockGraph) -> BlockProgram:
        """``block`` as it is installed: what it watches for is taken from the block that was recorded."""
        known = self.known.program
        return BlockProgram(block, known.signature, known.facts, known.reads, written=known.written)


@dataclass
class AlikeBlocks:
    """The kinds of blocks of one model that were verified.

    Args:
        original: gives a module's own forward.
    """

    original: Callable[[nn.Module], Callable[..., Any]]
    kinds: dict[type, list[Known]] = field(default_factory=dict)

    def add(self, known: Known) -> None:
        """Remember a block that was recorded and verified, before it is installed."""
        if not known.passes.graphs and known.program.block.root is None:
            self.kinds.setdefault(type(known.module), []).append(known)

    def propose(self, name: str, module: nn.Module, call_specs: list[CallSpec]) -> Bound | None:
        """The graph of a known block that is alike, bound to ``module``; None where there is none.

        Args:
            protos: the readings of a call of ``module``.
        """
        for known in self.kinds.get(type(module), ()):
            call_spec = next((p for p in call_specs if _same_call(known.call_spec, p)), None)
            if call_spec is None or unlike(known.module, module, _installed):
                continue
            bound = Bound(name, module, call_spec, known)
            forward = RewrittenForward(module, bound.program(known.program.block), self.original(module))
            if not forward.watch.gone and not forward.watch.everything():
                return bound
        return None


def bound_result(
    bound: Bound, verify: Callable[[BlockGraph], BlockCheck], quantize: QuantizeExperts | None = None
) -> tuple[BlockProgram, Result] | None:
    """The known graph as a block of its own, verified; None where it is not equivalent here.

    ``quantize``: the pass that gave the known block its formats: a plan may say otherwise of this block.
    """
    block = bound.known.program.block.copy()
    block.name = bound.name
    block.guard = copy.copy(block.guard)  # verification changes it, and the known block is installed with its own
    records = [dataclasses.replace(r, block=bound.name, seconds=0.0) for r in bound.known.passes.records]
    if quantize is not None:
        records = [
            _quantized_again(r, quantize, block, bound.module) if r.name == quantize.name else r for r in records
        ]
    verdict = verify(block)
    if verdict.passed is not True:
        return None
    return bound.program(block), Result(block, verdict, records)


def _quantized_again(record: PassRecord, quantize: QuantizeExperts, block: BlockGraph, root: nn.Module) -> PassRecord:
    """Give ``block`` the formats that the plan has for it; the record of that."""
    if not record.fired and record.reason.startswith("reverted"):
        return record  # its kernel was wrong on the known block, and would be here
    block.formats, block.codes, block.root = {}, {}, root
    try:
        return dataclasses.replace(record, fired=quantize.apply(block), reason="")
    except Declined as err:
        return dataclasses.replace(record, fired=0, reason=str(err), verified=False)
    finally:
        block.root = None


def _installed(path: str, module: nn.Module, name: str) -> bool:
    """Whether an attribute is the rewritten forward that this run put on a known block."""
    return not path and name == "forward" and isinstance(module.__dict__[name], RewrittenForward)


def _same_call(a: CallSpec, b: CallSpec) -> bool:
    """Equal roles, structures, dtypes and sizes of tensors, and equal plain arguments."""
    if a.leaves != b.leaves or a.flip_masks != b.flip_masks:
        return False
    (ours, spec), (theirs, other) = (pytree.tree_flatten((p.args, p.kwargs)) for p in (a, b))
    return spec == other and all(_same_leaf(x, y) for x, y in zip(ours, theirs, strict=True))


def _same_leaf(a: PyObject, b: PyObject) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and repr(a) == repr(b))
