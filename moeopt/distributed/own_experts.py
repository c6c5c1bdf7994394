"""That each rank still holds experts of its own: what wraps a model may give all ranks the weights of one.

``DistributedDataParallel`` sends rank 0's Parameters to every rank when it is made, and FSDP puts the ranks' parts of a
Parameter together, by name. An expert's own weight has a name on the ranks that hold it alone, so rank 1 would go on
with rank 0's experts, and no shape would tell. The first wrapper is told which to leave alone; whatever does so all the
same is seen: at each meeting a rank tells a digest of a few numbers of its first expert, and different experts that had
different numbers when they were divided are not to become the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.distributed.homes import ExpertHomes
from moeopt.distributed.parts import DividedWeight, OwnWeight, StackedWeight
from moeopt.errors import UsageError
from moeopt.value_types import PyObject

NUMBERS = 8
"""Of the first row of a weight, that the digest is of."""


class OwnExperts:
    """The digests of one op's ranks: which differ, and this rank's now.

    Args:
        module: the block, with the weights of all ranks still there.
        weights: of the op; only those that one expert reads alone are looked at, a stack is a ``DTensor``.
    """

    def __init__(self, module: nn.Module, weights: Sequence[DividedWeight], homes: ExpertHomes, rank: int) -> None:
        places = [_place(module, weights, homes.experts_of(r)) for r in range(homes.size)]
        digests = [int(digest(place)) for place in places]
        self._own = places[rank]
        pairs = itertools.combinations(range(homes.size), 2)
        self._apart = [(a, b) for a, b in pairs if digests[a] and digests[b] and digests[a] != digests[b]]

    def now(self) -> Tensor:
        """This rank's digest."""
        return digest(self._own)

    def check(self, heard: Sequence[int], block: str, ranks: Sequence[int]) -> None:
        """Nothing while ranks whose experts differed have different digests.

        Args:
            heard: the digest of each rank; 0 says nothing.
            ranks: of the job, for the message.

        Raises:
            UsageError: on every rank alike.
        """
        if len(set(heard)) == len(heard):
            return
        for a, b in self._apart:
            if heard[a] and heard[a] == heard[b]:
                raise UsageError(
                    f"{block}: rank {ranks[a]} and rank {ranks[b]} have the same numbers for different experts since "
                    "the model was distributed: a wrapper (DistributedDataParallel, FullyShardedDataParallel, "
                    "fully_shard) made the ranks' weights alike. Distribute the model again, and keep the experts out: "
                    "DistributedDataParallel(fast.model) leaves them alone where it wraps fast.model itself; give "
                    "fully_shard ignored_params=set(fast.expert_parameters.values()), FullyShardedDataParallel "
                    "ignored_states= the same. (A checkpoint whose experts are copies of one another is loaded before "
                    "moeopt.distribute)"
                )


def digest(place: tuple[dict[str, Any], str] | None) -> Tensor:
    """A number of a few numbers of a weight, as int64; 0 where there is none, or they are all the same."""
    weight: PyObject = None if place is None else place[0].get(place[1])
    if weight is None:
        return torch.zeros((), dtype=torch.int64)
    row = weight.detach()
    row = row.to_local() if hasattr(row, "to_local") else row
    while row.dim() > 1 and len(row):
        row = row[0]
    row = row.reshape(-1)[:NUMBERS].contiguous()
    if row.numel() < 2:
        return torch.zeros((), dtype=torch.int64)
    each: Tensor = row.view(torch.uint8).view(len(row), -1).to(torch.int64)  # floats of 8 bits cannot be compared
    factors = torch.arange(1, each.numel() + 1, device=row.device) * 2654435761 % 4294967291
    mixed: Tensor = (each.view(-1) * factors).sum()
    apart: Tensor = (each != each[0]).any()
    return mixed * apart


def expert_parameters(model: nn.Module, ops: Sequence[PyObject]) -> dict[str, Any]:
    """By name in ``model``, the Parameters and buffers of which this rank has a part or that it has alone."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, Any] = {}
    for op in ops:
        for weight in op.weights:
            registry, key = _registry(op.module, weight.path)
            if isinstance(weight, (OwnWeight, StackedWeight)) and registry.get(key) is not None:
                path = paths[id(op.module)]
                found[f"{path}.{weight.path}" if path else weight.path] = registry[key]
    return found


def leave_to_each_rank(model: nn.Module, names: Sequence[str]) -> None:
    """Tell ``DistributedDataParallel`` of ``model`` that the Parameters ``names`` are no business of other ranks.

    What the model's owner has told it stays. Where gradients are summed it calls a Parameter of the model itself ".w".
    """
    from torch.nn.parallel import DistributedDataParallel

    told = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    every = [*told, *names, *(f".{name}" for name in names if "." not in name)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(dict.fromkeys(every)))


def _place(
    module: nn.Module, weights: Sequence[DividedWeight], experts: Sequence[int]
) -> tuple[dict[str, Any], str] | None:
    """Where the first weight lies that the first of ``experts`` reads alone; None where there is none."""
    own = (w.path for w in weights if isinstance(w, OwnWeight) and experts and w.expert == experts[0])
    path = next(own, None)
    return None if path is None else _registry(module, path)


def _registry(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    parent, _, key = path.rpartition(".")
    home = module.get_submodule(parent)
    return (home._parameters if key in home._parameters else home._buffers), key
