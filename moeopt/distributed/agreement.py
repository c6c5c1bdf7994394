"""What all ranks must have alike before experts are divided: versions, arguments, programs, placements and weights.

Each rank tells a digest of each; a difference names the ranks, and what differs. Weights are compared one by one, for a
model that is made at random on each rank, without a seed, is another one on each.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.distributed.channel import Channel
from moeopt.distributed.install import ExpertOp
from moeopt.ir.row_function import RowFunction
from moeopt.optimized import Optimized
from moeopt.planning.placement import Placement
from moeopt.value_types import PyObject
from moeopt.verification.certificate import current_versions

CHUNK = 1 << 16
"""Numbers whose digest is taken at a time: half a megabyte for each of the few int64 tensors of one step."""


def agree(
    channel: Channel, opt: Optimized, model: nn.Module, ops: list[ExpertOp], placed: list[Placement],
    asked: Mapping[str, PyObject],
) -> None:  # fmt: skip
    """Compare this rank with the others.

    Raises:
        RankLostError: the first rank that has something else than most; the message names what.
    """
    facts: dict[str, Any] = {f"the version of {name}": version for name, version in current_versions().items()}
    facts |= {f"{name}=": value for name, value in asked.items()}
    facts["the class of the model"] = type(model).__qualname__
    facts["the blocks that are divided"] = ", ".join(op.name for op in ops)
    for op, placement in zip(ops, placed, strict=True):
        of = op.name if op.index == 0 else f"{op.name}, its op {op.index}"
        facts[f"the program of {of}"] = digest_of_text(str(op.forward.program.block.graph))
        facts[f"the experts' function of {of}"] = digest_of_text(op.spec.text)
        facts[f"placement of {of}"] = placement
    example = [t for t in torch.utils._pytree.tree_leaves(opt._call) if isinstance(t, Tensor)]
    facts["the example that the model was optimised with"] = digest_of_text(str([digest(t) for t in example]))
    weights = {f"the weights {name}": digest(t) for name, t in tensors_of(model)}
    facts["the weights"] = digest_of_text(json.dumps(weights))
    told = channel.hear("agreeing on program, placement and weights", json.dumps(facts))
    if len(set(told)) == 1:
        return
    every = [json.loads(text) for text in told]
    keys = list(dict.fromkeys(itertools.chain(*every)))
    different = [key for key in keys if len({json.dumps(one.get(key)) for one in every}) > 1]
    if different == ["the weights"]:  # all ranks found the same, so all of them look at each
        every = [json.loads(text) for text in channel.hear("comparing each weight", json.dumps(weights))]
        different = [key for key in dict.fromkeys(itertools.chain(*every)) if len({o.get(key) for o in every}) > 1]
    channel.compare([[json.dumps(one.get(key)) for key in different] for one in every], different)


def tensors_of(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Every Parameter and buffer by its name."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


def digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(t: Tensor) -> int:
    """A number that another shape, dtype, value or order of values does not give, but by a chance of 2^-60."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    t = t.detach()
    t = torch.view_as_real(t) if t.is_complex() else t
    flat = t.reshape(-1).contiguous().view(kinds[t.dtype.itemsize])
    total = int(digest_of_text(f"{t.dtype} {tuple(t.shape)}"), 16) & (1 << 60) - 1
    for first in range(0, len(flat), CHUNK):
        part = flat[first : first + CHUNK].long()
        odd = (torch.arange(first, first + len(part), device=flat.device) * 2 + 1) * 0x9E3779B97F4A7C1
        total = (total * 31 + int(((part + 1) * odd).sum())) & (1 << 60) - 1
    return total


def digest_of_expert(bank: PyObject, e: int, spec: PyObject) -> int:
    """That of all the weights of expert ``e``."""
    if isinstance(spec, RowFunction):
        parts = list(bank.slots(e))
    else:
        parts = [*bank.w_in(e), *bank.b_in(e), bank.w_out(e), bank.b_out(e), bank.norm(e)]
    return int(digest_of_text(str([None if part is None else digest(part) for part in parts])), 16)
