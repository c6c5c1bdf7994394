"""Which tensors of a call carry tokens, and how to make the same call with other tokens.

A prototype is one real call of a block with a role for each flattened leaf of ``(args, kwargs)``:

    tokens    floating activations, one row per token
    ids       integer expert ids, (tokens, K)
    choices   the same as a mask of zeros and ones, (tokens, E) or (tokens, K, E)
    weights   floating routing weights, (tokens, K) or (tokens, E)
    static    anything else; with ``lead`` > 0 its rows go with the tokens (a mask, input ids)
    pairs     (B or 1, heads or 1, S or 1, S) beside (B, S, H): what attention adds to, or allows, for pairs of tokens;
              (B, ...) beside it: what holds for each sequence (a language, a task, a condition);
              (T, T) beside (T, H): the edges of a graph
    bounds    (N + 1,) of sequences packed one behind the other: 0 = b_0 <= b_1 ... <= b_N = all tokens
    lengths   (N,) of these, which add up to all tokens
    filled    (B,) beside (B, S, H): how many of the S places of each sequence hold a token, S for one of them

``lead`` counts the token dims in front: 2 for (B, S, H), 1 for (T, H). A map (N, C, H, W) has its
features on axis 1 (``feature_axis=1``) and lead 3. The *grid* is the token dims of the first leaf that
has the most of them; a leaf with a lead of 1 beside a longer grid is flat: its rows are all the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeopt.errors import UsageError
from moeopt.ir.element_bytes import element_bytes

Role = Literal["tokens", "ids", "choices", "weights", "static", "pairs", "bounds", "lengths", "filled"]


@dataclass(frozen=True)
class ArgRole:
    """What one flattened argument is; see the module's docstring."""

    role: Role = "static"
    lead: int = 0
    feature_axis: int = -1
    dims: tuple[int | None, ...] = ()
    """Of ``pairs``: which token dim each dim follows, None where it stays."""


@dataclass
class CallSpec:
    """A call ``block(*args, **kwargs)`` and its leaves in ``pytree.tree_flatten((args, kwargs))`` order."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[ArgRole, ...]
    flip_masks: bool = False
    """Whether probe calls give marks that are all alike here (a mask of ones) other values too."""
    kept_columns: bool = False
    """Whether integers, and columns of whole numbers among the tokens (ids in a table of floats), keep values that they
    have here."""

    def __post_init__(self) -> None:
        self._values, self._spec = pytree.tree_flatten((tuple(self.args), dict(self.kwargs)))
        if len(self._values) != len(self.leaves):
            raise UsageError(f"the call has {len(self._values)} leaves, {len(self.leaves)} roles were given")
        self._moving = [n for n, leaf in enumerate(self.leaves) if leaf.lead]
        if not self._moving:
            raise UsageError("no argument has token dims: give the activations a lead of 1 or more")
        widest = max(self._moving, key=lambda n: self.leaves[n].lead)
        self.grid: tuple[int, ...] = tuple(self._tokens_first(widest).shape[: self.leaves[widest].lead])
        self._flat: dict[int, bool] = {}
        for n in self._moving:
            dims = tuple(self._tokens_first(n).shape[: self.leaves[n].lead])
            if dims != self.grid and dims != (math.prod(self.grid),):
                raise UsageError(f"argument {n} has token dims {dims}, which do not fit the grid {self.grid}")
            self._flat[n] = dims != self.grid

    def indices(self, role: Role) -> list[int]:
        """Leaf numbers of a role, those with token dims."""
        return [n for n in self._moving if self.leaves[n].role == role]

    def routed(self) -> list[int]:
        """Leaf numbers of arguments that name experts."""
        return [*self.indices("ids"), *self.indices("choices")]

    def integers(self) -> list[int]:
        """The integers that stand in arguments with token dims, sorted, each once; not those that name experts."""
        found = [self.rows(n) for n in self.indices("static") if self.rows(n).dtype in (torch.int64, torch.int32)]
        return sorted({int(v) for t in found for v in t.unique().tolist()})

    def slots(self, n: int) -> int:
        """K, the experts per token, of an argument that names experts (leaf ``n``).

        For a mask K is one more than the slots it has, since a row of a mask may name any number of experts.
        """
        own = self.rows(n)
        if self.leaves[n].role == "ids":
            return own.shape[-1]
        return 1 + (own.shape[-2] if own.dim() > 2 else 1)

    def naming(self, n: int, ids: Tensor) -> Tensor:
        """The rows that leaf ``n``, an argument that names experts, has where it names ``ids`` (tokens, K)."""
        own = self.rows(n)
        if self.leaves[n].role == "ids":
            return ids.reshape(len(ids), *own.shape[1:]).to(own)
        hot = torch.nn.functional.one_hot(ids.long(), own.shape[-1])
        hot[::3, 0] |= hot[::3, -1]
        return hot[:, :-1].reshape(len(ids), *own.shape[1:]).to(own)

    def rows(self, n: int) -> Tensor:
        """Leaf ``n`` as (tokens, ...features)."""
        moved = self._tokens_first(n)
        return moved.reshape(math.prod(moved.shape[: self.leaves[n].lead]), *moved.shape[self.leaves[n].lead :])

    def constant_masks(self) -> list[int]:
        """Leaf numbers of flags, and of zeros or ones, that are the same for all tokens of this call."""
        return [n for n in self._moving if self.leaves[n].role in ("static", "weights") and _alike(self.rows(n))]

    def replaced(
        self, n: int, change: Callable[[Tensor], Tensor | None]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """(args, kwargs) of the same call with leaf ``n`` changed; None if it is no tensor or ``change`` gives None."""
        own = self._values[n]
        new = change(own) if isinstance(own, Tensor) else None
        if new is None:
            return None
        values = [v.clone() if isinstance(v, Tensor) else v for v in self._values]
        values[n] = new
        args, kwargs = pytree.tree_unflatten(values, self._spec)
        return tuple(args), dict(kwargs)

    def with_tokens(
        self, grid: tuple[int, ...], rows: Mapping[int, Tensor] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the same call with token dims ``grid``.

        ``rows`` gives (tokens, ...features) per leaf number; a leaf left out repeats its own rows.
        """
        if len(grid) != len(self.grid):
            raise UsageError(f"the call has {len(self.grid)} token dims, {grid} has {len(grid)}")
        count = math.prod(grid)
        packed = any(leaf.role in ("bounds", "lengths") for leaf in self.leaves)
        if packed and self.grid[0] == 1:  # sequences that lie one behind the other are a batch of one
            grid = (*[1] * (len(grid) - 1), count)
        values = list(self._values)
        for n in self._moving:
            own = self.rows(n)
            new = rows[n] if rows is not None and n in rows else own[torch.arange(count) % max(len(own), 1)]
            if len(new) != count:
                raise UsageError(f"argument {n} is given {len(new)} rows for {count} tokens")
            if self.kept_columns:
                new = self._with_columns(own, new) if self.leaves[n].role == "tokens" else _values_of(own, new)
            shaped = new.reshape(*((count,) if self._flat[n] else grid), *own.shape[1:])
            axis = self.leaves[n].feature_axis
            values[n] = shaped if axis == -1 else shaped.movedim(-1, axis).contiguous()
        order = self._order_of_sequences()
        for n, leaf in enumerate(self.leaves):
            for d, follows in enumerate(leaf.dims):
                if follows is not None:  # repeated from its start: a token still sees itself
                    places = torch.arange(grid[follows]) % values[n].shape[d]
                    places = order[places] if of_sequence(leaf) else places
                    values[n] = values[n].index_select(d, places.to(values[n].device))
            if leaf.role in ("bounds", "lengths"):
                values[n] = _packed(count, leaf.role).to(values[n])
            elif leaf.role == "filled":
                values[n] = (grid[1] - torch.arange(grid[0]) % 3).clamp(min=1).to(values[n])
        args, kwargs = pytree.tree_unflatten(values, self._spec)
        return args, kwargs

    def _order_of_sequences(self) -> Tensor:
        """Sequences in which what holds for each (its language, say) is new come first: few then still differ."""
        first = next((n for n, leaf in enumerate(self.leaves) if of_sequence(leaf)), None)
        if first is None or not self._values[first].numel():
            return torch.arange(self.grid[0])
        rows = self._values[first].cpu()
        first_with: dict[bytes, int] = {}
        repeats = [first_with.setdefault(element_bytes(row).numpy().tobytes(), i) != i for i, row in enumerate(rows)]
        return torch.tensor(sorted(range(len(repeats)), key=repeats.__getitem__))

    def has_whole_columns(self) -> bool:
        """Whether a column of its tokens holds whole numbers alone, so that it may hold ids, or integers have gaps."""
        columns = any(bool(_whole_columns(self.rows(n)).any()) for n in self.indices("tokens"))
        return columns or any(_has_gaps(self.rows(n)) for n in self.indices("static"))

    def _with_columns(self, original: Tensor, new: Tensor) -> Tensor:
        """``new`` rows whose columns of whole numbers hold values of ``original``, each column by itself."""
        whole = _whole_columns(original)
        generator = torch.Generator().manual_seed(len(new))
        picks = torch.randint(max(len(original), 1), new.shape, generator=generator).to(original.device)
        return torch.where(whole, original.gather(0, picks), new) if len(original) else new

    def _tokens_first(self, n: int) -> Tensor:
        value: Tensor = self._values[n]
        axis = self.leaves[n].feature_axis
        return value.detach() if axis == -1 else value.detach().movedim(axis, -1)


def packed_role(value: Tensor, grid: tuple[int, ...]) -> Role | None:
    """Whether integers (N,) say where packed sequences of as many tokens as ``grid`` has end, or how long they are;
    else None. One length for each of several sequences side by side says how far each is filled."""
    tokens = math.prod(grid)
    if value.dim() != 1 or value.dtype not in (torch.int64, torch.int32) or not 1 <= len(value) <= tokens > 1:
        return None
    numbers = value.tolist()
    if len(numbers) > 1 and numbers[0] == 0 and numbers[-1] == tokens and numbers == sorted(numbers):
        return "bounds"
    packed = min(numbers) > 0 and sum(numbers) == tokens and len(numbers) < tokens
    return "lengths" if packed and (len(grid) == 1 or grid[0] == 1 < len(numbers)) else None


def is_filled(value: Tensor, grid: tuple[int, ...]) -> bool:
    """Whether integers (B,) may say how many places of each sequence of a ``grid`` (B, S) hold a token."""
    integers = value.dtype in (torch.int64, torch.int32) and len(grid) == 2 and tuple(value.shape) == grid[:1]
    return integers and bool(value.min() >= 1) and bool(value.max() == grid[1])


def _packed(count: int, role: Role) -> Tensor:
    """The same of ``count`` tokens: sequences of several lengths, as many as no other size is likely to be."""
    rest, lengths = count, list[int]()
    while rest > 0:
        lengths.append(min(rest, 2 + 3 * (len(lengths) % 3)))
        rest -= lengths[-1]
    found = torch.tensor(lengths, dtype=torch.int64)
    return found if role == "lengths" else torch.cat([found.new_zeros(1), found.cumsum(0)])


def of_sequence(leaf: ArgRole) -> bool:
    """Whether the argument has one row for each sequence."""
    return bool(leaf.dims) and leaf.dims[0] == 0 and all(follows is None for follows in leaf.dims[1:])


def _whole_columns(original: Tensor) -> Tensor:
    """For each of the features of (tokens, ...features), whether every token has a whole number there."""
    return (original.isfinite() & (original == original.round())).all(0)


def _has_gaps(original: Tensor) -> bool:
    """Whether some integer between the least and the largest is none of them."""
    if original.dtype not in (torch.int64, torch.int32) or not original.numel():
        return False
    return int(original.max() - original.min()) + 1 > len(original.unique())


def _values_of(original: Tensor, new: Tensor) -> Tensor:
    """``new`` with each integer that ``original`` lacks replaced by one that it has."""
    if original.dtype not in (torch.int64, torch.int32) or not original.numel():
        return new
    known = original.unique()
    return torch.where(torch.isin(new, known), new, known[(new - known[0]).abs() % len(known)])


def _alike(original: Tensor) -> bool:
    first = original.reshape(-1)[:1]
    return bool(first.numel()) and bool((original == first).all()) and bool((first == 0) | (first == 1))
