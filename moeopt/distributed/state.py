"""``state_dict`` of a distributed block: the user's own keys and the model's own order, whatever the placement.

    a stack of experts         a DTensor ``Shard(dim)`` of the whole stack, the experts in the model's order
    an expert's own Parameter  on the ranks that hold the expert
    anything else              on every rank, as it was

So ``torch.distributed.checkpoint`` loads on another number of ranks what it saved on this one. Where the placement is
not that of ``Shard`` the experts travel: ``state_dict()`` and ``load_state_dict()`` are then collective calls.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.distributed.channel import Channel
from moeopt.distributed.shards import Shard, local_part
from moeopt.ir.weight_refs import tensor_at
from moeopt.value_types import PyObject


class ExpertState:
    """The hooks of one block.

    Args:
        shards: the stacks of the block, by key.
        absent: keys of experts that this rank does not hold.
        mesh: of the DTensors.
    """

    def __init__(self, channel: Channel, shards: Sequence[Shard], absent: set[str], block: str, mesh: PyObject) -> None:
        self.channel, self.shards, self.absent, self.block, self.mesh = channel, list(shards), absent, block, mesh

    def install(self, module: nn.Module) -> None:
        """From now on ``module`` saves and loads so."""
        module.register_state_dict_post_hook(functools.partial(self.saved))  # torch marks it, and no method can be
        module.register_load_state_dict_pre_hook(self.loaded)

    def saved(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: PyObject) -> None:
        """Give stacks the model's own order."""
        for shard in self.shards:
            key = prefix + shard.weight.path
            if shard.room and key in state:
                self.channel.block = self.block
                local = state[key].detach().to_local()
                state[key] = self._sharded(shard, self._travel(shard, local, back=False), local)

    def loaded(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: PyObject, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Give stacks the order in which they are held; take whole tensors too, of which this rank needs a part."""
        for key in self.absent:
            state.pop(prefix + key, None)
        for shard in self.shards:
            key = prefix + shard.weight.path
            given, held = state.get(key), tensor_at(module, shard.weight.path)
            if given is None:
                continue
            whole = [len(shard.weight.experts) * shard.weight.length if d == shard.weight.dim else s
                     for d, s in enumerate(held.shape)]  # fmt: skip
            if list(given.shape) != whole:
                errors.append(
                    f"size mismatch for {key}: it is {tuple(given.shape)}, and the experts of all ranks "
                    f"are {tuple(whole)}"
                )
                state[key] = held.detach()
                continue
            state[key] = self._held(shard, given, held)

    def _held(self, shard: Shard, given: PyObject, held: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Sharded

        if isinstance(given, DTensor):
            split = tuple(given.placements) == (Sharded(shard.weight.dim),)
            if split and given.device_mesh.size() == self.channel.size:
                local: PyObject = given.detach()
                local = local.to_local()
                if shard.room:
                    self.channel.block = self.block
                    local = self._travel(shard, local, back=True)
                return self._physical(local, held)
            given = given.full_tensor()
        return self._physical(local_part(shard, self.channel.rank, given.detach().to(held.device)), held)

    def _physical(self, part: Tensor, held: PyObject) -> Tensor:
        from torch.distributed.tensor import DTensor

        made: Tensor = DTensor.from_local(
            part, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
        )
        return made

    def _sharded(self, shard: Shard, part: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Sharded

        dim = shard.weight.dim
        size = [len(shard.weight.experts) * shard.weight.length if d == dim else s for d, s in enumerate(like.shape)]
        stride = torch.empty(size, device="meta").stride()
        made: Tensor = DTensor.from_local(
            part, self.mesh, [Sharded(dim)], run_check=False, shape=torch.Size(size), stride=stride
        )
        return made

    def _travel(self, shard: Shard, local: PyObject, back: bool) -> Tensor:
        """This rank's part of the whole stack in the model's order; ``back``: from that to what the rank holds."""
        if local.dtype.itemsize == 1 and local.dtype != torch.uint8:  # codes that are floats of 8 bits
            return self._travel(shard, local.view(torch.uint8), back).view(local.dtype)
        P, own, dim = self.channel.size, self.channel.rank, shard.weight.dim
        length = shard.weight.length
        count = len(shard.weight.experts) * length
        chunk = -(-count // P)
        lines = local.movedim(dim, 0).contiguous()
        held = [[row * length + i for row in rows for i in range(length)] for rows in shard.rows]
        first = {line: rank for rank in reversed(range(P)) for line in held[rank]}
        moves = [
            (line // chunk, rank, line) for rank in range(P) for line in held[rank]
        ]  # from the chunk to the holder
        if not back:
            moves = [(rank, to, line) for to, rank, line in moves if first[line] == rank]
        at = held[own] if not back else list(range(own * chunk, min((own + 1) * chunk, count)))
        where = {line: n for n, line in enumerate(at)}
        sent, got = _by_rank(moves, P, 0, own), _by_rank(moves, P, 1, own)
        picked = torch.tensor([where[line] for line in itertools.chain(*sent)], dtype=torch.int64, device=local.device)
        facts = [-1, 2 if back else 1, 0, lines.shape[1:].numel(), 0, 0]
        counts = torch.tensor([len(part) for part in sent], device=local.device)
        to, of, _ = self.channel.meet("moving experts into the order of a state_dict", counts, facts)
        arrived = self.channel.send("moving experts into the order of a state_dict", lines[picked], to, of)
        wanted = held[own] if back else list(range(own * chunk, min((own + 1) * chunk, count)))
        room = shard.room * length if back else len(wanted)
        place = {line: n for n, line in enumerate(wanted)}
        result = lines.new_zeros(room, *lines.shape[1:])
        result[[place[line] for line in itertools.chain(*got)]] = arrived
        moved: Tensor = result.movedim(0, dim).contiguous()
        return moved


def _by_rank(moves: list[tuple[int, int, int]], P: int, end: int, own: int) -> list[list[int]]:
    """The lines that ``own`` sends (``end`` 0) to each rank, or gets (1) from each, in an order that both know."""
    return [[m[2] for m in moves if m[end] == own and m[1 - end] == rank] for rank in range(P)]
