"""Which token each expert saw: matched by value, so that no dispatch code has to be understood.

A probe call has distinct random rows. Whatever moved them (index, sort, one-hot einsum, pad, a Python
loop over ``.tolist()``), a row that reaches an expert's matmul is bit for bit a row of the tensor
``x`` that was dispatched, or that row times its routing weight.

Legend: T tokens, H hidden, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moeopt.capture.op_kinds import is_matmul, moves_rows, picks_rows
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.obstacles import Rank
from moeopt.recognise.gemm_sites import GemmSite, weight_and_operand
from moeopt.recognise.limits import limits_values


class NoTokens(Declined):
    """What look like experts read rows that are of no one tensor; other functions of the block may be its experts."""

    rank = Rank.READING


@dataclass
class Tokens:
    """The dispatched tensor ``node`` (feature axis ``axis``), T rows, and what each site's rows are.

    ``token[site]``: (R,) index of the token that each row is, -1 for an all-zero row.
    ``scale[site]``: (R,) factor on the row (1 for an exact copy), in float64.
    ``beside``: further tensors, (T rows, features last), whose row of the same token each expert reads as well.
    """

    node: fx.Node
    axis: int
    count: int
    token: dict[GemmSite, torch.Tensor]
    scale: dict[GemmSite, torch.Tensor]
    beside: tuple[fx.Node, ...] = ()

    @property
    def weighted(self) -> bool:
        """True where rows are multiplied before the experts see them."""
        return any(bool(((s != 1) & (self.token[k] >= 0)).any()) for k, s in self.scale.items())


def rows_of(value: torch.Tensor, axis: int) -> torch.Tensor:
    """``value`` as (T, H) rows with ``axis`` as the feature axis; (T, 1) where it is the one after the last."""
    if axis == value.dim():
        return value.reshape(-1, 1)
    return value.movedim(axis, -1).reshape(-1, value.shape[axis])


_MOST_SCALED = 2048
"""Rows among which directions are compared, all pairs: more are never probed on purpose."""


def match_tokens(tape: Tape, sites: list[GemmSite]) -> Tokens:
    """The first of :func:`token_readings`."""
    return next(token_readings(tape, sites))


def token_readings(tape: Tape, sites: list[GemmSite]) -> Iterator[Tokens]:
    """Tensors whose rows the ``sites`` multiply, earliest first, one for each order of rows and number of limits; then
    the tensor whose rows they multiply times a factor each.

    Raises:
        Declined: no tensor before the experts holds their rows.
    """
    first = min(s.matmul.meta["index"] for s in sites)
    wanted = {s: s.rows_in(tape.value(s.operand)) for s in sites}
    k = sites[0].matrices[0].k
    weighted: Tokens | None = None
    orders: list[tuple[list[bytes], int]] = []
    widths = list(dict.fromkeys(w.shape[-1] for w in wanted.values()))
    if len(widths) > 1:
        raise _several_widths(tape, sites, widths)
    sources = ancestors([sites[0].operand])
    limits = [n for n in sources if limits_values(tape, n)]
    probe = _row_that_is_not_zero(wanted.values(), sites[0].matmul.meta.get("source"))
    for node in (n for n in tape.nodes[:first] if n in sources):
        for axis in _feature_axes(node, k):
            rows = rows_of(tape.value(node), axis)
            near = _near(rows, probe)
            if near == "no":
                continue
            exact = _exact(node, axis, rows, wanted) if near == "row" else None
            if exact is not None and (weighted is None or exact.count <= weighted.count):
                limited = len(ancestors([node]).intersection(limits)) if limits else 0
                keys = (rows_as_bytes(rows), limited)
                if keys not in orders:
                    orders.append(keys)
                    yield exact
            if orders:
                continue
            if weighted is None and len(rows) <= _MOST_SCALED:
                weighted = _scaled(node, axis, rows, wanted)
    if weighted is not None:  # last: where rows lie sorted by expert, and weighted, no other tensor has them by token
        yield weighted
    if orders or weighted is not None:
        return
    if (inputs := _inputs_of(sites)) > 1:
        raise NoTokens(
            f"its experts read the rows of {inputs} different inputs of the block (as of each task's own), and the "
            "op's experts all read the rows of one; make a block of the experts of each input, or leave the block as "
            "it is: each of its experts runs once",
            sites[0].matmul.meta.get("source"),
            rank=Rank.FOUND,
        )
    raise NoTokens(
        "the experts' input rows are not rows of any one tensor (slots that mix tokens, or a transformation "
        "per expert before its first matmul); only whole tokens can be dispatched",
        sites[0].matmul.meta.get("source"),
    )


def _inputs_of(sites: list[GemmSite]) -> int:
    """How many arguments of the block the sites read, moved at most; 0 where one reads something else."""
    sources = set[fx.Node]()
    for site in sites:
        node = site.operand
        while moves_rows(node) and not picks_rows(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        sources.add(node)
    return len(sources) if all(n.op == "placeholder" for n in sources) else 0


def _several_widths(tape: Tape, sites: list[GemmSite], widths: list[int]) -> Declined:
    early = computed_before_choice(tape, [s.operand for s in sites], sites[0].matmul)
    return early or Declined(
        f"the experts' first matmuls take rows of different widths ({' and '.join(map(str, widths))}), as of a "
        "condition beside each token, and the op hands an expert one row of one tensor; join them before the "
        "experts (torch.cat([x, condition], -1)), and take the row apart inside each",
        sites[0].matmul.meta.get("source"),
        rank=Rank.READING,
    )


def computed_before_choice(tape: Tape, operands: Iterable[fx.Node], reader: fx.Node) -> Declined | None:
    """The reason for experts that read, at ``reader``, rows of a product of all of them which their router reads as
    well; None where none of the ``operands`` is of one."""
    named = dict(tape.root.named_parameters(remove_duplicate=False))
    for node in operands:
        while moves_rows(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        found = weight_and_operand(node, {}) if is_matmul(node) else None
        held = [str(n.target) for n in ancestors([found[0]]) if n.op == "get_attr"] if found is not None else []
        stack = next((name for name in held if name in named and named[name].dim() > 2), None)
        if stack is not None:
            return Declined(
                f"a first product of its experts ({stack}) is computed for all tokens before experts are chosen, so "
                "each reads rows of that product beside its tokens; compute it again inside of each expert, of the "
                f"rows that chose it (x[row] @ {stack.rpartition('.')[2]}[e])",
                reader.meta.get("source"),
            )
    return None


def _row_that_is_not_zero(operands: Iterable[torch.Tensor], source: str | None) -> torch.Tensor:
    """(H,) the first row of the experts' operands (R, H) that is not all zeros; ``Declined`` where there is none."""
    filled = next((w for w in operands if w.bool().any()), None)
    if filled is None:
        raise Declined("no token reached its experts", source, rank=Rank.PROBE)
    return filled[filled.bool().any(-1)][0]


def _feature_axes(node: fx.Node, width: int) -> list[int]:
    """Axes along which a computed float tensor may hold rows of ``width`` features, the last first."""
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if shape is None or dtype is None or not dtype.is_floating_point or len(shape) < 2 or node.op == "get_attr":
        return []
    return sorted((d for d, s in enumerate(shape) if s == width), reverse=True)


def _near(rows: torch.Tensor, probe: torch.Tensor) -> str:
    """How one operand row stands in ``rows``: as a "row", as a "direction" (scaled), or "no"."""
    if bool((rows.to(probe.dtype) == probe).all(-1).any()):
        return "row"
    dot = rows.double() @ probe.double()
    size = rows.double().norm(dim=-1) * probe.double().norm()
    return "direction" if bool((dot.abs() >= size * (1 - 1e-3)).logical_and(size > 0).any()) else "no"


def rows_as_bytes(rows: torch.Tensor) -> list[bytes]:
    """Each of (R, H) rows as a key that equal rows have in common."""
    if not rows.numel():
        return []
    data = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [r.tobytes() for r in data]


def _exact(node: fx.Node, axis: int, rows: torch.Tensor, wanted: dict[GemmSite, torch.Tensor]) -> Tokens | None:
    where: dict[torch.dtype, dict[bytes, list[int]]] = {}
    token, scale = {}, {}
    for site, operand in wanted.items():
        if operand.dtype not in where:
            table = where[operand.dtype] = {}
            for t, key in enumerate(rows_as_bytes(rows.to(operand.dtype))):
                table.setdefault(key, []).append(t)
        zero = ~operand.bool().any(-1)
        found = _places(rows_as_bytes(operand), site.matrix, where[operand.dtype])
        found[zero & (found == -2)] = -1
        if (found == -2).any():
            return None
        token[site] = found
        scale[site] = torch.ones(found.shape, dtype=torch.float64)
    return Tokens(node, axis, rows.shape[0], token, scale)


def _places(keys: list[bytes], matrix: torch.Tensor, where: dict[bytes, list[int]]) -> torch.Tensor:
    """Token of each row, -2 for none. Of tokens that are equal, an expert sees each once, in order."""
    found = torch.full((len(keys),), -2, dtype=torch.long)
    seen: dict[tuple[bytes, int], int] = {}
    which_matrix = matrix.tolist()
    for r, key in enumerate(keys):
        tokens = where.get(key)
        if tokens is not None:
            turn = 0
            if len(tokens) > 1:
                which = (key, which_matrix[r])
                turn = seen[which] = seen.get(which, -1) + 1
            found[r] = tokens[turn % len(tokens)]
    return found


def _scaled(node: fx.Node, axis: int, rows: torch.Tensor, wanted: dict[GemmSite, torch.Tensor]) -> Tokens | None:
    """Rows that are tokens times a factor: the same direction, within the dtype's rounding."""
    x = rows.double()
    norm = x.norm(dim=-1)
    if x.shape[-1] < 3 or x.shape[0] < 2 or not bool((norm > 0).all()):
        return None
    unit = x / norm[:, None]
    if bool(((unit @ unit.T).abs() - torch.eye(x.shape[0], dtype=x.dtype)).max() > 1 - 1e-6):
        return None
    token, scale = {}, {}
    for site, operand in wanted.items():
        a = operand.double()
        size = a.norm(dim=-1)
        cosine = (a @ unit.T) / size.clamp_min(1e-300)[:, None]
        best = cosine.abs().max(-1)
        tolerance = 64 * torch.finfo(operand.dtype).eps ** 2 + 1e-12
        zero = size == 0
        if not bool(((1 - best.values**2 <= tolerance) | zero).all()):
            return None
        token[site] = torch.where(zero, -1, best.indices)
        dot = (a * x[best.indices]).sum(-1) / (norm[best.indices] ** 2)
        scale[site] = torch.where(zero, 0.0, dot)
    return Tokens(node, axis, rows.shape[0], token, scale)
