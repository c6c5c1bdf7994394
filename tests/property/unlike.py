"""Calls of a program in use: the example as it lies in memory, and inputs that the example does not resemble.

Shape legend: T tokens, E experts, H hidden. A call is the tuple of positional arguments.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.property.build import inputs, others
from tests.property.routers import Route
from tests.property.spec import Program

Rows = Callable[[Program, nn.Module, Tensor, torch.Generator], Tensor]

GRIDS = {"one row": (1, 1), "many rows": (3, 31)}
"""(batch, length) of the calls that have other sizes; the others have the example's, (2, 7)."""


def aimed(weight_EH: Tensor, logit: float) -> Tensor:
    """(H,): the shortest step that moves every logit by about so much; a norm in front bounds what is reached."""
    w = weight_EH.detach().double()
    return (torch.linalg.pinv(w) @ torch.full((w.shape[0],), logit, dtype=torch.float64)).to(weight_EH.dtype)


def to_logits(logit: float) -> Rows:
    def rows(p, model, x, generator):
        routers = [m for m in model.modules() if isinstance(m, Route) and m.rows is not None]
        return x + aimed(routers[0].rows, logit / p.router.gain) if routers else x

    return rows


def to_all_gates(logit: float) -> Rows:
    """The router and the gate of the shared expert together, so that neither hides the other."""

    def rows(p, model, x, generator):
        blocks = [m for m in model.modules() if hasattr(m, "shared_gate") and m.router.rows is not None]
        return x + aimed(torch.cat([blocks[0].router.rows, blocks[0].shared_gate.weight]), logit) if blocks else x

    return rows


def to_shared_gate(logit: float) -> Rows:
    def rows(p, model, x, generator):
        gate = next((m.shared_gate for m in model.modules() if hasattr(m, "shared_gate")), None)
        return x if gate is None else x + aimed(gate.weight, logit)

    return rows


def every_other(change: Callable[[Tensor], Tensor]) -> Rows:
    """Every second row is changed, so that broken rows stand beside sound ones."""

    def rows(p, model, x, generator):
        flat = x.reshape(-1, x.shape[-1]).clone()
        flat[::2] = change(flat[::2])
        return flat.view(x.shape)

    return rows


def nan_row(p, model, x, generator):
    flat = x.reshape(-1, x.shape[-1]).clone()
    flat[flat.shape[0] // 2, p.hidden // 2] = math.nan
    return flat.view(x.shape)


def duplicated(p, model, x, generator):
    flat = x.reshape(-1, x.shape[-1])
    return flat[torch.randint(3, (flat.shape[0],), generator=generator)].view(x.shape)


def as_is(p, model, x, generator):
    return x


UNLIKE: dict[str, Rows] = {
    "other": as_is,
    "one row": as_is,
    "many rows": as_is,
    "zero rows": every_other(torch.zeros_like),
    "rows of 1e-5": every_other(lambda x: x * 1e-5),
    "rows of 1e-20": every_other(lambda x: x * 1e-20),
    "rows of 1e4": every_other(lambda x: x * (200.0 if x.dtype == torch.float16 else 1e4)),
    "logits at -45": to_logits(-45.0),
    "logits at -12": to_logits(-12.0),
    "logits at 12": to_logits(12.0),
    "logits at 45": to_logits(45.0),
    "shared gate at -20": to_shared_gate(-20.0),
    "all gates at -20": to_all_gates(-20.0),
    "duplicated rows": duplicated,
    "a NaN row": nan_row,
}


def expanded(x: Tensor) -> Tensor:
    """The first row of the first axis for all of them, with a stride of zero."""
    return x[:1].expand_as(x) if x.dim() == 3 else x


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "expanded": expanded,
}


def example(p: Program) -> tuple[Tensor, ...]:
    x, *rest = inputs(p, 0)
    if p.around.near_one:
        x[..., 0] = 0
    return MEMORY[p.example](x), *rest


def calls(p: Program, model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """The example, and a call of each kind; ``model`` is asked for its router's weights only."""
    made: dict[str, tuple[Tensor, ...]] = {"example": example(p)}
    for number, (name, rows) in enumerate(UNLIKE.items()):
        generator = torch.Generator().manual_seed(1000 * p.seed + 100 + number)
        grid: tuple[int, ...] = GRIDS.get(name, (2, 7))
        grid = grid if p.around.rank == 3 else (math.prod(grid),)
        x = torch.randn(*grid, p.hidden, generator=generator).to(getattr(torch, p.dtype))
        made[name] = (rows(p, model, x, generator), *others(p, grid, generator, first=False))
    if p.example != "contiguous":
        made["other, as the example lies"] = (MEMORY[p.example](made["other"][0]), *made["other"][1:])
    if p.around.mask:  # an engine may hold the example's way only, and must say so of the other
        mask = (torch.rand(made["other"][0].shape[:-1], generator=generator) > 0.3).to(made["other"][0].dtype)
        made["the mask as the example had none"] = (made["other"][0], mask)
        made["no mask"] = made["other"][:1]
    return made
