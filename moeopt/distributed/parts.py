"""What of a Parameter belongs to which expert, so that a rank can keep its own part of it.

Either one expert reads the Parameter, or several lie in it one after the other along one dimension, or neither: then
every rank keeps it whole, and :class:`WholeWeight` says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from moeopt.ir.weight_refs import ExpertRef, MatrixRef, PartRef, SlotRefs, VectorRef, parts_of
from moeopt.rewrite.block_program import BlockProgram


@dataclass(frozen=True)
class OwnWeight:
    """A Parameter of one expert."""

    path: str
    expert: int


@dataclass(frozen=True)
class StackedWeight:
    """A Parameter in which ``experts`` lie in this order along ``dim``, ``length`` each."""

    path: str
    dim: int
    length: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class WholeWeight:
    """A Parameter that every rank keeps, and why."""

    path: str
    reason: str


DividedWeight = OwnWeight | StackedWeight | WholeWeight


def weights_of(
    module: nn.Module, program: BlockProgram, index: int, elsewhere: Iterable[int], codes: Sequence[str] = ()
) -> list[DividedWeight]:
    """How the Parameters of the op number ``index`` of a block are divided.

    Args:
        module: the block.
        elsewhere: identities of Parameters that are known under several names, so that one cannot be divided.
        codes: names of the buffers that stand in the place of its matrices; all experts' lie in each, in their order.
    """
    block = program.block
    refs, _ = block.weights[index]
    shared, kept = set(elsewhere), (*block.kept_modules, *block.frozen)
    kept = (*kept, *(str(n.target) for n in block.graph.nodes if n.op == "get_attr"))
    others = {p.path for n, (more, _) in enumerate(block.weights) if n != index for r in more for p in parts_of(r)}
    readers: dict[str, dict[int, list[MatrixRef | VectorRef | PartRef]]] = {}
    for e, ref in enumerate(refs):
        for part in vectors_of(ref) if codes else parts_of(ref):
            readers.setdefault(part.path, {}).setdefault(e, []).append(part)
    stacks: list[DividedWeight] = [StackedWeight(name, 0, 1, tuple(range(len(refs)))) for name in codes]
    return stacks + [_divided(module, path, of, refs, shared, kept, others) for path, of in readers.items()]


def vectors_of(ref: ExpertRef | SlotRefs) -> list[MatrixRef | VectorRef | PartRef]:
    """The biases of an expert whose matrices are codes."""
    return [part for part in parts_of(ref) if isinstance(part, VectorRef)]


def _divided(
    module: nn.Module, path: str, of: dict[int, list[MatrixRef | VectorRef | PartRef]],
    refs: Sequence[ExpertRef | SlotRefs], shared: set[int], kept: Sequence[str], others: set[str],
) -> DividedWeight:  # fmt: skip
    parent, _, key = path.rpartition(".")
    parameter = module.get_submodule(parent)._parameters.get(key)
    if parameter is None:
        return WholeWeight(path, "it is a buffer or an attribute; make it a Parameter (requires_grad=False for codes)")
    if id(parameter) in shared:
        return WholeWeight(path, "the model has it under several names")
    if path in others or any(path == k or path.startswith(f"{k}.") for k in kept):
        return WholeWeight(path, "code beside the experts reads it")
    if any(getattr(refs[e], "neurons", None) is not None for e in of):
        return WholeWeight(path, "its experts are neurons that lie anywhere in it")
    if len(of) == 1:
        return OwnWeight(path, next(iter(of)))
    for dim, size in enumerate(parameter.shape):
        if size % len(of):
            continue
        length = size // len(of)
        places = {e: _place(parts, dim, length) for e, parts in of.items()}
        if sorted(p for p in places.values() if p is not None) == list(range(len(of))):
            return StackedWeight(path, dim, length, tuple(sorted(of, key=lambda e: places[e] or 0)))
    return WholeWeight(path, "its experts do not lie one after the other in it")


def _place(parts: Sequence[MatrixRef | VectorRef | PartRef], dim: int, length: int) -> int | None:
    """The stretch of ``length`` along ``dim`` in which all of ``parts`` lie; None where there is none."""
    ends = [end for part in parts for end in _ends(part, dim)]
    first, last = min(ends) // length, max(ends) // length
    return first if first == last else None


def _ends(part: MatrixRef | VectorRef | PartRef, dim: int) -> tuple[int, int]:
    """The first and the last index of ``part`` along ``dim``."""
    if isinstance(part, PartRef):
        steps = [(size - 1) * step[dim] for size, step in zip(part.shape, part.steps, strict=True)]
    else:
        steps = [(part.m - 1) * part.dm[dim]]
        steps += [(part.k - 1) * part.dk[dim]] if isinstance(part, MatrixRef) else []
    first = part.origin[dim]
    return first + sum(s for s in steps if s < 0), first + sum(s for s in steps if s > 0)
