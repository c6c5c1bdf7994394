"""Calls of few tokens that share experts in every way, for a block whose Python reads numbers of its routing.

What Python makes of such numbers is on no tape: a table that is looked up by counts, a factor that is a comparison, a
function of compiled code. So original and rewritten are called on tokens that were picked for the experts that they go
to by themselves, until the numbers take the values on which code turns. Each call runs once on either; where the
results are not close, the judge of the other cases decides.

    at random      equal ids at both ends, counts that are equal or one apart, no id above a limit
    one repeated   all counts equal or 0; n tokens of one expert, for n around each number in the block's code
    within a set   the first half of the experts, the last, two tokens' own; all but one expert
    balanced       every expert has as many tokens
    in order       ids that are sorted
    alone          a token of each set of experts that the rows have, as in decoding

Shape legend: R rows, T tokens, K experts of a token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from moeopt.capture.call_roles import CallSpec
from moeopt.value_types import PyObject
from moeopt.verification.cases import CaseBuilder
from moeopt.verification.distance import as_rows, finite_rows, token_distance
from moeopt.verification.oracle import Restored
from moeopt.verification.results import Case
from moeopt.verification.trees import equal_leaves, flatten

ROWS = 96
"""From which the tokens are picked."""
_CLOSE = 16
"""Times eps: results that lie nearer to each other are not judged."""
_WIDEST = 12
"""Tokens of a call, but for those around a number."""
_LARGEST = 64
"""The largest number that calls are made around; more tokens than that are a case of their own."""


class FewTokens:
    """The calls for one block.

    Args:
        experts: of the block.
        numbers: in the block's code.
        aimed: (N, H), what experts like best, one after the other; None where that is not known.
        chosen: experts of a token.
        count: how many calls.
        seed: of what is at random.
    """

    def __init__(
        self, call_spec: CallSpec, experts: int, numbers: Iterable[int], aimed: Tensor | None, chosen: int, count: int,
        seed: int,
    ) -> None:  # fmt: skip
        self._spec, self._experts, self._chosen, self._count = call_spec, experts, chosen, count
        self._numbers = sorted({n for n in numbers if 2 < n < _LARGEST})
        self._generator = torch.Generator().manual_seed(seed + 11)
        self._build = CaseBuilder(call_spec, experts, seed + 11, None)
        self._rows = self._build.draw(ROWS)
        if aimed is not None:
            for n in call_spec.indices("tokens"):
                self._aim(self._rows[n], aimed)
        for n in call_spec.routed():
            slots = call_spec.slots(n)
            order = [torch.randperm(max(experts, slots), generator=self._generator)[:slots] for _ in range(ROWS)]
            self._rows[n] = call_spec.naming(n, torch.stack(order) % experts)

    @property
    def all_rows(self) -> Case:
        """The call that shows where each row goes."""
        return self._case("where each row goes", list(range(ROWS)))

    def cases(self, ids_RK: Tensor | None) -> Iterator[Case]:
        """``count`` calls.

        Args:
            ids_RK: the experts of each row of :attr:`all_rows`; None where they are not known.
        """
        kinds = [self._at_random(), self._repeated()]
        if ids_RK is not None and len(ids_RK) == ROWS:
            named = self._named(ids_RK)
            own = [tuple(sorted(set(ids))) for ids in named]
            first_R = torch.tensor([ids[0] if ids else self._experts for ids in named])
            kinds += [self._within(own), self._balanced(own), self._in_order(first_R)]
        given = 0
        while given < self._count:
            for kind in list(kinds):
                picked = next(kind, None)
                if picked is None:
                    kinds.remove(kind)
                elif picked[1]:
                    given += 1
                    yield self._case(*picked)
                if given == self._count:
                    return

    def alone(self, ids_RK: Tensor | None) -> Iterator[Case]:
        """Calls of one token, up to twice as many as the others: one for each set of experts that a row has."""
        if ids_RK is not None and len(ids_RK) == ROWS:
            row_of = {tuple(sorted(set(ids))): row for row, ids in enumerate(self._named(ids_RK))}
            for row in list(row_of.values())[: 2 * self._count]:
                yield self._case("one token", [row])

    def names(self, chosen: int) -> bool:
        """Whether each argument that names experts has a place for each of ``chosen`` experts of a token."""
        return all(self._spec.slots(n) == chosen + self._is_mask(n) for n in self._spec.routed())

    def of(self, ids_TK: Tensor) -> Case:
        """A call of as many tokens; where the block is given its ids, of these: then :meth:`names` K must hold."""
        tokens = len(ids_TK)
        case_rows = {n: value[torch.arange(tokens, device=value.device) % ROWS] for n, value in self._rows.items()}
        again = torch.cat([ids_TK, ids_TK[:, :1]], 1)  # a mask may name one more
        case_rows |= {n: self._spec.naming(n, again if self._is_mask(n) else ids_TK) for n in self._spec.routed()}
        return Case("experts in an exact order", *self._spec.with_tokens(self._build.flat(tokens), case_rows))

    def _is_mask(self, n: int) -> bool:
        return self._spec.leaves[n].role == "choices"

    def _named(self, ids_RK: Tensor) -> list[list[int]]:
        """The experts of each row; other ids stand for none."""
        return [[e for e in ids if 0 <= e < self._experts] for ids in ids_RK.tolist()]

    def _aim(self, rows: Tensor, aimed: Tensor) -> None:
        """Make half of ``rows`` such as neighbouring experts like best."""
        if rows.dim() != 2 or aimed.shape[-1] != rows.shape[-1]:
            return
        unit = aimed.double() / aimed.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        mixed = sum(unit.roll(-slot, 0) * 0.95**slot for slot in range(self._chosen))[: ROWS // 2]
        size = rows.double().norm(dim=-1).mean() * 2
        rows[: len(mixed)] = (mixed / mixed.norm(dim=-1, keepdim=True).clamp_min(1e-12) * size).to(rows)

    def _case(self, name: str, picked: list[int]) -> Case:
        rows = {n: value[torch.tensor(picked, device=value.device)] for n, value in self._rows.items()}
        args, kwargs = self._spec.with_tokens(self._build.flat(len(picked)), rows)
        return Case(name, args, kwargs)

    def _draw(self, below: int, count: int) -> list[int]:
        return torch.randint(below, (count,), generator=self._generator).tolist()

    def _at_random(self) -> Iterator[tuple[str, list[int]]]:
        turn = 0
        while True:
            tokens = (2, 3, 1, 4, 2, 6, 1, 5, 3, 8)[turn % 10]
            yield "a few tokens", self._draw(ROWS, tokens)
            turn += 1

    def _repeated(self) -> Iterator[tuple[str, list[int]]]:
        around = [m for n in self._numbers for m in (n + 1, n, n - 1)]
        for times in dict.fromkeys([3, 2, *around, 4, 7]):
            yield f"one token, {times} times", self._draw(ROWS, 1) * times

    def _within(self, own: list[tuple[int, ...]]) -> Iterator[tuple[str, list[int]]]:
        """Rows all of whose experts are in a set."""
        first, last = self._draw(ROWS, 2)
        sets = [{*own[first], *own[last]}]
        for some in (self._chosen, max(self._experts // 2, self._chosen)):
            sets += [set(range(some)), set(range(self._experts - some, self._experts))]
        sets += [set(range(self._experts)) - {e} for e in (0, self._experts - 1, *self._draw(self._experts, 2))]
        for number in self._draw(ROWS, 4):
            sets.append(set(own[number]))
        for among in sets:
            fit = [r for r, experts in enumerate(own) if among.issuperset(experts)]
            yield "tokens of some of the experts", fit[: min(2 * len(among), _WIDEST)]

    def _balanced(self, own: list[tuple[int, ...]]) -> Iterator[tuple[str, list[int]]]:
        """Rows that give every expert as many tokens, as far as there are such."""
        for start in self._draw(ROWS, 3):
            counts, picked = [0] * self._experts, list[int]()
            for _ in range(4 * self._experts):
                if picked and len(set(counts)) == 1 or len(picked) >= 4 * _WIDEST:
                    break
                order = [(start + r) % ROWS for r in range(ROWS)]
                row = min(order, key=lambda r: (sum(counts[e] for e in own[r]), r in picked))
                picked.append(row)
                for e in own[row]:
                    counts[e] += 1
            yield "tokens for every expert alike", picked

    def _in_order(self, first_R: Tensor) -> Iterator[tuple[str, list[int]]]:
        """Rows in the order of their first experts."""
        for descending in (False, True):
            picked = torch.tensor(self._draw(ROWS, 5))
            at = first_R[picked].argsort(descending=descending, stable=True)
            yield "tokens in the order of their experts", picked[at].tolist()


def unlike(original: Callable[..., Any], rewritten: Callable[..., Any], cases: Iterable[Case]) -> Iterator[Case]:
    """Those of ``cases`` on which the results of the two are not close."""
    one, other = Restored(original), Restored(rewritten)
    for case in cases:
        try:
            expected = one(case.args, case.kwargs)
        except Exception:  # a call that the original does not take shows nothing
            continue
        try:
            given = other(case.args, case.kwargs)
        except Exception:  # the judge says which
            yield case
            continue
        (leaves, form), (others, other_form) = flatten(expected), flatten(given)
        if form != other_form or not all(map(_close, leaves, others)):
            yield case


def _close(a: PyObject, b: PyObject) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return math.isclose(a, b) if isinstance(a, float) and isinstance(b, float) else equal_leaves(a, b)
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not a.is_floating_point():
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if not torch.equal(finite_rows(as_rows(a)), finite_rows(as_rows(b))):
        return False
    return not bool((token_distance(a, b.double()) > _CLOSE * torch.finfo(a.dtype).eps).any())
