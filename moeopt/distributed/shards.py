"""A rank keeps the experts that it owns: the rest of each divided Parameter goes.

A Parameter of one expert is kept or dropped. A stack becomes a ``DTensor``, sharded along the experts' dimension: in
the model's own order where the placement is that of ``Shard``, else in the order of the ranks, each padded to the
same number of experts. ``moeopt.distributed.state`` gives it back in the model's own order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.distributed.homes import ExpertHomes
from moeopt.distributed.parts import DividedWeight, OwnWeight, StackedWeight
from moeopt.ir.weight_refs import ExpertRef, SlotRefs
from moeopt.rewrite.live_weights import Place
from moeopt.value_types import PyObject


@dataclass(frozen=True)
class Shard:
    """One stack on one rank.

    Args:
        weight: what it is of.
        rows: for each rank, the places in the whole stack that it holds, in its order.
        room: places that each rank has, empty ones included; 0 where the order is the model's own.
    """

    weight: StackedWeight
    rows: list[list[int]]
    room: int


def shard_of(weight: StackedWeight, homes: ExpertHomes) -> Shard:
    """How ``weight`` is divided under a placement."""
    at = {e: place for place, e in enumerate(weight.experts)}
    rows = [[at[e] for e in homes.experts_of(rank) if e in at] for rank in range(homes.size)]
    count, P = len(at), homes.size
    chunk = -(-count // P)
    if rows == [list(range(min(r * chunk, count), min((r + 1) * chunk, count))) for r in range(P)]:
        return Shard(weight, rows, 0)
    return Shard(weight, rows, max(len(own) for own in rows))


def local_part(shard: Shard, rank: int, whole: Tensor) -> Tensor:
    """What ``rank`` keeps of a whole stack, a copy; empty places are zeros."""
    if whole.dtype.itemsize == 1 and whole.dtype != torch.uint8:  # codes that are floats of 8 bits are moved as bytes
        return local_part(shard, rank, whole.view(torch.uint8)).view(whole.dtype)
    dim, length = shard.weight.dim, shard.weight.length
    pieces = [whole.narrow(dim, row * length, length) for row in shard.rows[rank]]
    empty = max(shard.room - len(pieces), 0)
    shape = list(whole.shape)
    shape[dim] = empty * length
    return torch.cat([*pieces, whole.new_zeros(shape)], dim)


def divided(shard: Shard, rank: int, whole: Tensor, mesh: PyObject) -> Tensor:
    """``whole``, a Parameter or a buffer, of which this rank keeps its part."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Sharded

    dim = shard.weight.dim
    part = local_part(shard, rank, whole.detach())
    shape = list(whole.shape)
    if shard.room:
        shape[dim] = shard.room * len(shard.rows) * shard.weight.length
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    held = DTensor.from_local(part, mesh, [Sharded(dim)], run_check=False, shape=size, stride=stride)
    return nn.Parameter(held, requires_grad=whole.requires_grad) if isinstance(whole, nn.Parameter) else held


def drop(
    module: nn.Module, weights: Sequence[DividedWeight], homes: ExpertHomes, rank: int, mesh: PyObject
) -> list[Shard]:
    """Keep of ``weights`` what ``rank`` holds; gives the stacks. The whole tensors are freed with their last owner."""
    own, shards = set(homes.experts_of(rank)), []
    for weight in weights:
        parent, _, key = weight.path.rpartition(".")
        home = module.get_submodule(parent)
        registry: dict[str, Any] = home._parameters if key in home._parameters else home._buffers
        if isinstance(weight, OwnWeight) and weight.expert not in own:
            registry[key] = None
        elif isinstance(weight, StackedWeight):
            shard = shard_of(weight, homes)
            registry[key] = divided(shard, rank, registry[key], mesh)
            shards.append(shard)
    return shards


def local_refs(
    refs: Sequence[ExpertRef | SlotRefs], weights: Sequence[DividedWeight], own: Sequence[int]
) -> list[ExpertRef | SlotRefs]:
    """Where the experts ``own`` lie in what :func:`drop` left, in their order."""
    stacks = {w.path: w for w in weights if isinstance(w, StackedWeight)}

    def moved(part: PyObject) -> PyObject:
        stack = None if part is None else stacks.get(part.path)
        if stack is None:
            return part
        here = [e for e in own if e in stack.experts].index(expert)
        shift = (here - stack.experts.index(expert)) * stack.length
        origin = tuple(o + shift * (d == stack.dim) for d, o in enumerate(part.origin))
        return dataclasses.replace(part, origin=origin)

    found: list[ExpertRef | SlotRefs] = []
    for expert in own:
        ref = refs[expert]
        if isinstance(ref, SlotRefs):
            found.append(dataclasses.replace(ref, slots=tuple(map(moved, ref.slots))))
        else:
            found.append(
                dataclasses.replace(
                    ref, w_in=tuple(map(moved, ref.w_in)), b_in=tuple(map(moved, ref.b_in)),
                    w_out=moved(ref.w_out), b_out=moved(ref.b_out),
                )
            )  # fmt: skip
    return found


class LocalPlace(Place):
    """A Parameter of which this rank has a part: a read gives that part as a plain tensor, its gradient included."""

    def __init__(self, root: nn.Module, path: str) -> None:
        super().__init__(root, path)
        self.part_shape = _local(self.registry[self.key]).shape

    def read(self) -> Tensor:
        return _local(super().read())


def _local(tensor: PyObject) -> Tensor:
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
