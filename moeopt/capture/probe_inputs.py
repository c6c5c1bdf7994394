"""Inputs for a block's traces: one that reaches every expert, two of other shapes.

Rows are random at the scale of the real ones, so that every row is distinct and every size is one
that the user's example did not have. Where rows at random miss an expert, rows of the block's own
small matrices are mixed in: a router row is the direction that its expert likes best.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moeopt.capture.call_roles import ArgRole, CallSpec, is_filled, packed_role
from moeopt.errors import Declined, UsageError
from moeopt.obstacles import Rank
from moeopt.value_types import PyObject


def call_specs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[CallSpec]:
    """Readings of a real call, likeliest first: features on the last axis, on axis 1, only the batch varies."""
    leaves, _ = pytree.tree_flatten((tuple(args), dict(kwargs)))
    first = next((t for t in leaves if _float(t) and t.dim() >= 2), None)
    if first is None:
        yield from _integer_prototypes(args, kwargs, leaves)
        return
    readings = [(-1, first.dim() - 1)]
    if first.dim() >= 3:
        readings.append((1, first.dim() - 1))
    if first.dim() > 2:
        readings.append((-1, 1))
    for axis, lead in readings:
        grid = tuple(first.movedim(axis, -1).shape[:lead])
        roles = tuple(_leaf(t, first, grid, axis, lead) for t in leaves)
        for reading in (*_of_sequences(roles, leaves, grid), *_readings(roles, leaves)):
            try:
                yield CallSpec(tuple(args), dict(kwargs), reading)
            except UsageError:  # the arguments' sizes do not fit this reading
                continue


def _integer_prototypes(args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]) -> Iterator[CallSpec]:
    """A call with token ids alone: every axis of the first integer tensor counts tokens."""
    first = next((t for t in leaves if isinstance(t, torch.Tensor) and not _float(t) and t.dim() >= 1), None)
    if first is None:
        raise Declined("it is called without a tensor of tokens, so it cannot be probed", rank=Rank.PROBE)
    grid = tuple(first.shape)
    for lead in dict.fromkeys((len(grid), 1)):
        roles = tuple(
            ArgRole("static", lead)
            if isinstance(t, torch.Tensor) and tuple(t.shape[:lead]) == grid[:lead]
            else ArgRole()
            for t in leaves
        )
        yield CallSpec(tuple(args), dict(kwargs), roles)


def _float(t: PyObject) -> bool:
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def _of_all(t: torch.Tensor, first: torch.Tensor, grid: tuple[int, ...], axis: int) -> ArgRole | None:
    """What is said of all tokens together: the edges of a graph, (T, T) beside (T, H); where packed sequences end."""
    if len(grid) == 1 and tuple(t.shape) == grid * 2 and first.shape[axis] != grid[0] > 1:
        return ArgRole("pairs", dims=(0, 0))
    packed = packed_role(t, grid)
    return None if packed is None else ArgRole(packed)


def _leaf(t: PyObject, first: torch.Tensor, grid: tuple[int, ...], axis: int, lead: int) -> ArgRole:
    if not isinstance(t, torch.Tensor) or t.dim() == 0:
        return ArgRole()
    if (whole := _of_all(t, first, grid, axis)) is not None:
        return whole
    if _float(t) and t.dim() == first.dim() and tuple(t.movedim(axis, -1).shape[:lead]) == grid:
        same = t.shape[axis] == first.shape[axis]
        return ArgRole("tokens" if same else "weights", lead, axis)
    if len(grid) == 2 == lead and t.dim() == 4 and t.shape[0] in (1, grid[0]) and t.shape[-1] == grid[1] > 1:
        batch = 0 if t.shape[0] == grid[0] else None
        return ArgRole("pairs", dims=(batch, None, 1 if t.shape[2] == grid[1] else None, 1))
    total = math.prod(grid)
    for count in (len(grid), 1):
        dims = tuple(t.shape[:count])
        if t.dim() >= count and (dims == grid if count == len(grid) else dims == (total,)):
            if _float(t):
                return ArgRole("tokens" if t.dim() > count and t.shape[-1] == first.shape[axis] else "weights", count)
            if _one_hot(t, count):
                return ArgRole("choices", count)
            looks_like_ids = t.dtype in (torch.int64, torch.int32) and t.dim() == count + 1 and not _multi_hot(t)
            return ArgRole("ids" if looks_like_ids else "static", count)
    return ArgRole()


def _readings(roles: tuple[ArgRole, ...], leaves: list[Any]) -> Iterator[tuple[ArgRole, ...]]:
    """``roles``, and the other reading of integers of which all are 0 or 1: a mask over experts, or ids."""
    yield roles
    other = tuple(
        ArgRole("ids", leaf.lead) if _may_be_ids(leaf, t) else leaf for leaf, t in zip(roles, leaves, strict=True)
    )
    if other != roles:
        yield other


def _of_sequences(
    roles: tuple[ArgRole, ...], leaves: list[Any], grid: tuple[int, ...]
) -> Iterator[tuple[ArgRole, ...]]:
    """``roles``, with tensors of as many entries as there are sequences (a language, a task, a condition of each) as
    what follows the number of sequences."""
    if len(grid) < 2 or grid[0] < 2:
        return
    found = tuple(
        ArgRole("pairs", dims=(0, *([None] * (t.dim() - 1))))
        if isinstance(t, torch.Tensor) and leaf == ArgRole() and t.dim() and t.shape[0] == grid[0]
        else leaf
        for leaf, t in zip(roles, leaves, strict=True)
    )
    filled = tuple(
        ArgRole("filled") if isinstance(t, torch.Tensor) and leaf.role == "pairs" and is_filled(t, grid) else leaf
        for leaf, t in zip(found, leaves, strict=True)
    )
    if filled != found:  # a number of places that it has: a language of that number is tried after it
        yield filled
    if found != roles:
        yield found


def _may_be_ids(leaf: ArgRole, t: PyObject) -> bool:
    """True for integers (tokens, K) that were not read as ids."""
    if not isinstance(t, torch.Tensor) or not leaf.lead or leaf.role not in ("choices", "static"):
        return False
    return t.dim() == leaf.lead + 1 and t.dtype in (torch.int64, torch.int32)


def _one_hot(t: torch.Tensor, lead: int) -> bool:
    """True for a mask over experts: zeros and ones, at most a single one along the last axis."""
    if t.dim() not in (lead + 1, lead + 2) or t.shape[-1] < 2 or t.is_complex() or not t.numel():
        return False
    return bool(((t == 0) | (t == 1)).all()) and bool((t != 0).sum(-1).max() == 1)


def _multi_hot(t: torch.Tensor) -> bool:
    """True for a mask that names any number of experts: as ids, a row of zeros and ones would repeat itself."""
    return t.shape[-1] > 2 and bool(((t == 0) | (t == 1)).all()) and bool((t == 0).any()) and bool((t == 1).any())


def probe_call(
    call_spec: CallSpec,
    tokens: int,
    seed: int,
    *,
    experts: int = 0,
    aimed: torch.Tensor | None = None,
    flat: bool = False,
    variant: int = 0,
    paired: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with about ``tokens`` tokens in a shape that no example is likely to have.

    Args:
        experts: when known and ids are arguments, ids cover ``range(experts)``.
        aimed: (R, H) directions to mix in, each at the scale of the real rows.
        variant: 0, 1 or 2: which shape; the token dims of the three differ everywhere.
        flat: many sequences of two tokens instead of a few long ones.
        paired: each token stands beside one that is nearly the same, so that an expert which one of them chooses has
            two rows: of a single one, its dimension is not told from others of one element.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = _grid(len(call_spec.grid), tokens, variant)
    if flat and len(grid) > 1:
        grid = (tokens // 2, *grid[1:-1], 2)
    count = math.prod(grid)
    rows: dict[int, torch.Tensor] = {}
    order = torch.randint(1 << 30, (count,), generator=generator)
    for n, leaf in enumerate(call_spec.leaves):
        if not leaf.lead:
            continue
        own = call_spec.rows(n)
        picked = own[order.to(own.device) % max(len(own), 1)] if len(own) else own.new_zeros(count, *own.shape[1:])
        if leaf.role == "tokens":
            rows[n] = _tokens(own, count, generator, aimed)
        elif leaf.role == "weights" and _float(own):
            rows[n] = (picked.float() * (0.5 + torch.rand(picked.shape, generator=generator)).to(own.device)).to(own)
        elif leaf.role == "ids" and experts:
            rows[n] = _ids(count, own.shape[-1], experts, generator).to(own)
        elif leaf.role == "choices":
            rows[n] = call_spec.naming(n, _ids(count, call_spec.slots(n), own.shape[-1], generator))
        elif own.dtype in (torch.int64, torch.int32) and own.numel():
            rows[n] = _integers(own, count, generator)
        else:
            rows[n] = picked.clone()
        if paired:
            rows[n] = _pairs(rows[n], generator) if leaf.role == "tokens" else _twice(rows[n])
    for n in call_spec.constant_masks() if call_spec.flip_masks else ():
        other = (torch.rand(rows[n].shape, generator=generator) < 0.3).to(rows[n].device)
        rows[n] = torch.where(other, (call_spec.rows(n).reshape(-1)[0] == 0).to(rows[n]), rows[n])
    return call_spec.with_tokens(grid, rows)


def _twice(rows: torch.Tensor) -> torch.Tensor:
    """Each second row is the one before."""
    return rows[::2].repeat_interleave(2, 0)[: len(rows)]


_APART = 2.0**-6
"""By how much of the rows' scale two tokens of a pair differ: more than bfloat16 rounds, and little for a router."""


def _pairs(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each second row is nearly the one before."""
    twice = _twice(rows)
    scale = twice.float().square().mean().sqrt()
    noise = torch.randn(twice.shape, generator=generator).to(twice.device)
    noise[::2] = 0
    return (twice.float() + _APART * scale * noise).to(rows)


_HEADS = (
    {2: (3,), 3: (2, 3), 4: (2, 2, 3)},
    {2: (2,), 3: (3, 2), 4: (3, 1, 2)},
    {2: (5,), 3: (1, 4), 4: (1, 3, 1)},
)
"""Leading token dims of the three probe calls, by rank: no size is the same in all of them."""


def _grid(rank: int, tokens: int, variant: int) -> tuple[int, ...]:
    head = () if rank == 1 else _HEADS[variant].get(rank, (1,) * (rank - 2) + (variant + 1,))
    return (*head, max(-(-tokens // math.prod(head)), 1))


def _tokens(original: torch.Tensor, count: int, generator: torch.Generator, aimed: torch.Tensor | None) -> torch.Tensor:
    finite = original[original.isfinite()].float()
    scale = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
    scale = scale if scale > 0 else 1.0
    rows = torch.randn((count, *original.shape[1:]), generator=generator) * scale
    if aimed is not None and aimed.shape[-1] == original.shape[-1] and original.dim() == 2 and count > 4:
        take = min(len(aimed), count - count // 4)
        unit = aimed[:take] / aimed[:take].norm(dim=-1, keepdim=True).clamp_min(1e-12)
        rows[:take] = unit * scale * math.sqrt(original.shape[-1]) * 2 + 0.05 * rows[:take]
    return rows.to(original)


def _integers(original: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Integers within the range seen, all of them in turn, so that token ids are distinct where they can be."""
    low, high = int(original.min()), int(original.max()) + 1
    shape = (count, *original.shape[1:])
    turns = -(-math.prod(shape) // (high - low)) + 1
    values = torch.cat([torch.randperm(high - low, generator=generator) for _ in range(min(turns, 4096))])
    values = values.repeat(-(-math.prod(shape) // len(values)))
    return (values[: math.prod(shape)] + low).reshape(shape).to(original)


def _ids(count: int, slots: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """(count, slots) ids: all experts in turn, distinct in a row where there are enough."""
    order = torch.cat([torch.randperm(experts, generator=generator) for _ in range(-(-count * slots // experts) + 1)])
    ids = order[: count * slots].reshape(count, slots)
    for t in range(count):
        if slots <= experts and len(set(ids[t].tolist())) < slots:
            ids[t] = torch.randperm(experts, generator=generator)[:slots]
    return ids


def aimed_at_router(module: nn.Module, call_spec: CallSpec, experts: Collection[str] = ()) -> torch.Tensor | None:
    """:func:`aimed_rows` for a block that is called with rows of tokens (T, H); None where there are none."""
    first = call_spec.rows(call_spec.indices("tokens")[0]) if call_spec.indices("tokens") else None
    return aimed_rows(module, first.shape[-1], experts) if first is not None and first.dim() == 2 else None


def aimed_rows(module: nn.Module, width: int, experts: Collection[str] = (), limit: int = 4096) -> torch.Tensor | None:
    """Rows of the block's small matrices with ``width`` columns: likely router rows.

    Args:
        experts: paths of Parameters that are known as the experts', of whatever shape a router has.
    """
    found = []
    others = [parameter for path, parameter in module.named_parameters() if path not in experts]
    alike = Counter(p.shape for p in others)  # experts come in numbers, a router is alone
    for parameter in others:
        if (
            alike[parameter.shape] <= 2
            and parameter.dim() == 2
            and parameter.is_floating_point()
            and parameter.device.type != "meta"
        ):
            rows = parameter if parameter.shape[1] == width else parameter.t() if parameter.shape[0] == width else None
            if rows is not None and rows.shape[0] <= limit:
                found.append(rows.detach().float().cpu())
    found.sort(key=len)
    return torch.cat(found)[:limit] if found else None
