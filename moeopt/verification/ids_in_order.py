"""Calls whose expert ids have an exact order, for a block whose Python reads numbers of its routing.

A factor may be 2 where ``ids.flatten().tolist() == [0, 1, 2, 3]``, where each row of ids ascends, or where the ids
are a palindrome. No input is likely to make a router choose so. So the choice is replaced, in the original and in the
rewritten block alike: the router runs, and its ids are exchanged before the dispatch reads them.

    in order      all experts once, ascending or descending, row by row or column by column
    each row      ascending, descending; one row repeated
    palindrome    ids that read the same backwards
    as in code    a list of numbers in the block's code or attributes, as ids
    one token     each order of a few experts

Shape legend: T tokens, K experts of a token, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.value_types import PyObject
from moeopt.verification.oracle import record_selections
from moeopt.verification.pins import RoutingLog
from moeopt.verification.results import Case

_ORDERS = 24
"""The largest number of calls of one token."""
_LONG = 4
"""The number of rows where one row is repeated, and of experts that are permuted."""


def orders(experts: int, chosen: int, listed: Iterable[Sequence[int]], most: int) -> Iterator[Tensor]:
    """Ids (T, K), each row of different experts.

    Args:
        listed: sequences of numbers in the block's code that may be ids.
        most: the largest number of rows of a call.
    """
    if not 0 < chosen <= experts:
        return
    given = [_rows(numbers, chosen) for numbers in listed if all(0 <= n < experts for n in numbers)]
    tokens = min(-(-experts // chosen), most)
    every = [[(token * chosen + slot) % experts for slot in range(chosen)] for token in range(tokens)]
    columns = [[(token + slot * tokens) % experts for slot in range(chosen)] for token in range(tokens)]
    ascending = [list(range(e, e + chosen)) for e in range(min(experts - chosen + 1, most))]
    kinds = [every, columns, ascending, [every[0]] * _LONG, [every[-1]] * _LONG, every[:2]]
    kinds += [_reversed(rows) for rows in kinds] + [[*rows, *_reversed(rows)] for rows in (every[:1], every[:2])]
    few = list(itertools.islice(itertools.permutations(range(min(experts, _LONG)), min(chosen, _LONG)), _ORDERS))
    rest = list(range(_LONG, chosen))  # the ids after those that are permuted
    kinds += [[[*order, *rest]] for order in few]
    seen = set()
    for rows in (*given, *kinds):
        known = tuple(map(tuple, rows))
        if rows and known not in seen and all(len(set(row)) == chosen for row in rows):
            seen.add(known)
            yield torch.tensor(rows)


def _rows(numbers: Sequence[int], chosen: int) -> list[list[int]]:
    """``numbers`` as rows of ids; [] where they do not fill whole rows."""
    whole = numbers and len(numbers) % chosen == 0
    return [list(numbers[n : n + chosen]) for n in range(0, len(numbers), chosen)] if whole else []


def _reversed(rows: list[list[int]]) -> list[list[int]]:
    """The ids in reverse order."""
    return [row[::-1] for row in rows[::-1]]


class Choosing:
    """``run``, a call of a block, with ``ids`` (T, K) in place of its choices number ``at``."""

    def __init__(self, run: Callable[..., Any], module: PyObject, at: Sequence[int]) -> None:
        self.run, self.module, self.at = run, module, at
        self.ids = torch.empty(0, 0, dtype=torch.int64)

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        with RoutingLog(dict.fromkeys(self.at, self._exchanged)):
            return self.run(*args, **kwargs)

    def _exchanged(self, own: Tensor) -> Tensor:
        """``ids`` in the shape of the choice ``own`` (..., K or more), followed by its other experts."""
        tokens, chosen = self.ids.shape
        if own.numel() != tokens * own.shape[-1] or own.shape[-1] < chosen:
            return own
        rows = []
        for row, now in zip(self.ids.tolist(), own.reshape(tokens, -1).tolist(), strict=True):
            rows.append((row + [e for e in now if e not in row])[: own.shape[-1]])
        return torch.tensor(rows, dtype=own.dtype, device=own.device).view(own.shape)


class _Logged:
    """``run``, a call of a block, with its choices recorded."""

    def __init__(self, run: Callable[..., Any], module: PyObject) -> None:
        self.run, self.module = run, module
        self.chosen: list[Tensor] = []

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        with RoutingLog() as log:
            out = self.run(*args, **kwargs)
        self.chosen = [event.ids for event in log.events]
        return out


def choices_of(run: Callable[..., Any], module: PyObject, case: Case, ids_TK: Tensor) -> tuple[int, ...]:
    """The numbers of the choices that are ``ids_TK`` in the call ``case`` of ``run``, a call of ``module``.

    The original may make one choice several times, once for each expert; the rewritten code makes it once.
    """
    logged = _Logged(run, module)
    record_selections(logged, case.args, case.kwargs)
    tokens, chosen = ids_TK.shape
    return tuple(
        number
        for number, own in enumerate(logged.chosen)
        if own.shape[-1] >= chosen
        and own.numel() == tokens * own.shape[-1]
        and torch.equal(own.reshape(tokens, -1)[:, :chosen].cpu(), ids_TK.cpu().long())
    )
