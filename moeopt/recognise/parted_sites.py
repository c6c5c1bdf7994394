"""One product whose result is taken apart: gate and up of each expert on an axis of their own.

    h = einsum("td,edcf->tecf", x, w)          w (E, D, 2, F): no expert's gate and up are one matrix of the Parameter
    y = silu(h[..., 0, :]) * h[..., 1, :]      each part is a product of its own, with matrices w[e, :, c]

A part is a site at the node that takes it; all parts share the product's operand and call.

Legend: R rows of the operand, B matrices that a row meets, M outputs of each.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.replay import replay
from moeopt.capture.tape import Tape
from moeopt.ir.weight_refs import Index, MatrixRef
from moeopt.recognise.gemm_site import GemmSite

_TAKES = ("select", "slice", "getitem")
_MOST = 1 << 22
"""Numbers of a product's result that are followed."""


def parts_of(tape: Tape, site: GemmSite) -> list[GemmSite]:
    """The parts of ``site`` as sites of their own; [] where it is not taken apart, or not along the axes of its
    Parameter."""
    taken = _taken(site)
    if len(taken) < 2 or len(site.matrices) < 2 or any(b is not None for b in site.biases):
        return []
    if len({m.path for m in site.matrices}) > 1 or len(site.matrices[0].origin) < 4:
        return []
    if math.prod(site.matmul.meta["shape"]) > _MOST or bool((site.matrix < 0).any()):
        return []
    labels, places = _labels(tape, site)
    moved = replay(tape, [*_between(site, taken), *taken], {site.matmul: labels})
    found = [_part(site, node, moved[node], places) for node in taken]
    parts = [p for p in found if p is not None]
    alike = {(p.matrices[0].m, p.blocks, len(p.matrices)) for p in parts}
    shown = torch.cat([moved[node].flatten() for node in taken])
    if len(parts) < len(taken) or len(alike) > 1 or len(shown.unique()) < len(shown):
        return []
    return parts


def _taken(site: GemmSite) -> list[fx.Node]:
    """The last movements of the product's result, each behind one that takes a part of it; [] where something else
    reads it before."""
    taken: list[fx.Node] = []
    stack: list[tuple[fx.Node, bool]] = [(site.matmul, False)]
    while stack:
        node, part = stack.pop()
        users = [u for u in node.users if "index" in u.meta]
        on = [u for u in users if moves_rows(u) and len(u.all_input_nodes) == 1]
        if on and len(on) == len(users):
            stack += [(u, part or op_name(u) in _TAKES) for u in on]
        elif not part:
            return []
        else:
            taken.append(node)
    return sorted(taken, key=lambda n: int(n.meta["index"]))


def _between(site: GemmSite, taken: list[fx.Node]) -> list[fx.Node]:
    """The nodes between the product and what is ``taken`` of it, in order."""
    nodes: set[fx.Node] = set()
    for node in taken:
        while (node := node.all_input_nodes[0]) is not site.matmul:
            nodes.add(node)
    return sorted(nodes, key=lambda n: int(n.meta["index"]))


def _labels(tape: Tape, site: GemmSite) -> tuple[torch.Tensor, torch.Tensor]:
    """A number for each element of the product's result; and of each number, its row and its place in the Parameter."""
    m, count = site.matrices[0].m, site.matrix.numel()
    labels = torch.arange(count * m).view(count, m)
    origins, steps = (torch.tensor([getattr(r, name) for r in site.matrices]) for name in ("origin", "dm"))
    along = torch.arange(m)[None, :, None] * steps[site.matrix][:, None]
    places = origins[site.matrix][:, None] + along  # (R * B, M, axes of the Parameter)
    rows = (torch.arange(count) // site.blocks)[:, None, None].expand(-1, m, 1)
    return site.from_rows(labels, tape.value(site.matmul)), torch.cat([rows, places], -1).flatten(0, 1)


def _part(site: GemmSite, node: fx.Node, labels: torch.Tensor, places: torch.Tensor) -> GemmSite | None:
    """The site of one part: along one axis of ``node`` the outputs of a matrix follow one another."""
    best: tuple[int, int] | None = None
    for axis in (d for d, size in enumerate(labels.shape) if size > 1):
        lines = places[labels.movedim(axis, -1)]  # (..., M, 1 + axes)
        step = lines.reshape(-1, *lines.shape[-2:]).diff(dim=1)
        moving = step[0, 0].nonzero().flatten().tolist()
        if len(moving) == 1 and moving[0] > 0 and bool((step == step[0, 0]).all()):
            best = max(best or (0, 0), (moving[0], axis))
    if best is None:
        return None
    axis = best[1]
    lines = places[labels.movedim(axis, -1)].reshape(-1, labels.shape[axis], places.shape[1])
    starts, dm = lines[:, 0], lines[0, 1] - lines[0, 0]
    _, order = starts.unique(dim=0, return_inverse=True)  # by the row, then by the place in the Parameter
    rows = site.matrix.numel() // site.blocks
    if len(order) % rows or len(order.unique()) < len(order):
        return None
    sorted_starts = starts[order.argsort()]
    origins, matrix = sorted_starts[:, 1:].unique(dim=0, return_inverse=True)
    if not torch.equal(sorted_starts[:, 0], torch.arange(rows).repeat_interleave(len(order) // rows)):
        return None
    part = copy.copy(site)
    size = int(labels.shape[axis])
    part.matrices = [_ref(site.matrices[0], origin, dm[1:], size) for origin in origins.tolist()]
    part.node, part.axis_out, part.matrix, part.blocks = node, axis, matrix, len(order) // rows
    part.biases = []
    part.order = None if torch.equal(order, torch.arange(len(order))) else order
    return part


def _ref(like: MatrixRef, origin: Index, dm: torch.Tensor, size: int) -> MatrixRef:
    return MatrixRef(like.path, tuple(origin), like.dk, tuple(dm.tolist()), like.k, size)
