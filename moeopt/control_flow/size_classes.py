"""Classes of sizes that a block's Python treats alike, derived from the operands in calls of several sizes.

An operand that is equal in two calls of equal sizes and differs in a call of other sizes is a size, or computed from
one. A comparison with a number gives a limit between two classes, a division by a number gives remainders. Any other
operation gives no classes: then each size is verified by itself.

    if 23 <= len(x) < 150          limits 23 and 150
    n % 4, n // 4, n & 3           divisor 4
    n & (n - 1), math.log2(n)      none
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from moeopt.control_flow.decisive_values import called
from moeopt.control_flow.operand_facts import is_unknown
from moeopt.control_flow.size_uses import Item, Use, parts_of
from moeopt.control_flow.size_values import SizeValues
from moeopt.rewrite.known_sizes import SizeUses
from moeopt.value_types import PyObject

_LARGEST = 1 << 12
"""The largest divisor whose remainders are classes."""
_NAMELESS: dict[type, str] = {ast.GeneratorExp: "<genexpr>", ast.ListComp: "<listcomp>", ast.Lambda: "<lambda>"}
_SEVERAL = 4
"""At most so many values of one operand in one call are followed."""


@dataclass(frozen=True)
class SizedCall:
    """A call: its sizes followed by their product, and the values of the operands in its code."""

    sizes: tuple[int, ...]
    seen: SizeValues


@dataclass
class _Found:
    """The limits and divisors found so far for one size."""

    limits: set[float] = field(default_factory=set)
    divisors: set[int] = field(default_factory=set)


class SizeClasses:
    """What the Python code of several calls does with their sizes.

    Args:
        calls: of several sizes, and at least two of equal sizes.

    Attributes:
        uses: for each size, its limits and divisors; a call without tokens is a class of its own.
        texts: the source of the expressions that read sizes.
    """

    def __init__(self, calls: Sequence[SizedCall]) -> None:
        self._calls = calls
        pairs = itertools.combinations(range(len(calls)), 2)
        self._pairs = [(a, b) for a, b in pairs if calls[a].sizes == calls[b].sizes]
        self._found = [_Found() for _ in calls[0].sizes]
        self._exact = False
        self.texts: list[str] = []
        self._by_node: dict[ast.AST, Use] = {}
        self._stored: set[str] = set()
        self._ran = set().union(*(c.seen.ran for c in calls))
        self._unresolved = set().union(*(c.seen.unresolved for c in calls))
        keys = dict.fromkeys(use for call in calls for use, _ in call.seen.values)
        self._by_node = {use.node: use for use in [*keys][::-1] if use.kind != "clip"}
        stored = [use for use in keys if use.kind == "store" and self._is_size(use, 0)]
        self._stored = {use.node.attr for use in stored if isinstance(use.node, ast.Attribute)}
        for use in sorted((use for use in keys if use.kind != "store"), key=_place):
            self._read(use)
        for place in sorted(set().union(*(c.seen.unread for c in calls))):
            self._exact = True
            self.texts.append(f"code without its source, {place}")
        self.uses = tuple(
            SizeUses(tuple(sorted(v for v in f.limits if v > 1)), tuple(sorted(f.divisors)), self._exact)
            for f in self._found
        )

    def _read(self, use: Use) -> None:
        sized = [n for n in range(len(use.operands)) if self._is_size(use, n)]
        if use.kind in ("clip", "split") and type(self._constant(use, 1)) is not int:
            return
        if not sized or (use in self._unresolved and called(use.node) in self._ran):  # type: ignore[arg-type]
            return
        if all(self._is_remainder(use.operands[n], use) for n in sized):
            return
        text = f"{ast.unparse(use.node)[:80]}"
        if text not in self.texts:
            self.texts.append(text)
        reader: Callable[[Use, list[int]], bool] = getattr(self, f"_of_{use.kind}")
        if not reader(use, sized):
            self._exact = True

    # one method for each kind of expression: it records limits and divisors, and returns whether it understood the kind

    def _of_compare(self, use: Use, sized: list[int]) -> bool:
        node: ast.Compare = use.node  # type: ignore[assignment]
        for n, op in enumerate(node.ops):
            if not {n, n + 1} & {*sized}:
                continue
            if isinstance(op, (ast.Is, ast.IsNot)):  # with None: between numbers ``is`` depends on Python's cache
                return self._constant(use, n + 1) is None
            within = isinstance(op, (ast.In, ast.NotIn))
            side = {ast.Gt: 1, ast.LtE: 1, ast.Lt: -1, ast.GtE: -1}.get(type(op), 0)
            if not (self._of_members(use, n) if within else self._crosses(use, n, n + 1, side)):
                return False
        return True

    def _of_members(self, use: Use, n: int) -> bool:
        """``size in numbers``."""
        held = self._constant(use, n + 1)
        if isinstance(held, range):
            held = (held.start, held.stop) if held.step == 1 else None
        if not isinstance(held, tuple) or not all(type(number) is int for number in held):
            return False
        return all(self._limit(self._numbers(use, n), number) for number in held)

    def _of_divide(self, use: Use, sized: list[int]) -> bool:
        quotient = not isinstance(getattr(use.node, "op", None), ast.Mod)
        return self._divides(use, self._constant(use, 1), sized, quotient)

    def _of_bits(self, use: Use, sized: list[int]) -> bool:
        by, op = self._constant(use, len(use.operands) - 1), getattr(use.node, "op", None)
        if sized != [0] or type(by) is not int or by < 0:
            return False
        if isinstance(op, (ast.LShift, ast.Pow)):
            return True
        if isinstance(op, ast.RShift):
            return self._divides(use, 1 << by, sized, True)
        return isinstance(op, ast.BitAnd) and by & (by + 1) == 0 and self._divides(use, by + 1, sized)

    def _of_truth(self, use: Use, sized: list[int]) -> bool:
        held = next(iter(self._calls[0].seen.values.get((use, 0), {None})))
        return (isinstance(held, tuple) and not is_unknown(held)) or self._limit(self._numbers(use, 0), 0)

    def _of_call(self, use: Use, sized: list[int]) -> bool:
        name = called(use.node)  # type: ignore[arg-type]
        if name in ("min", "max", "sym_min", "sym_max"):
            count = len(use.operands)
            return all(self._crosses(use, a, b, 1) for a in range(count) for b in range(a) if {a, b} & {*sized})
        if name == "range":  # the same in each turn
            steps = self._constant(use, 2) if len(use.operands) > 2 else 1
            turns = (1, 2, 3) if steps != 1 else ()
            return type(steps) is int and all(
                self._limit(self._numbers(use, n), k * steps, 1) for n in sized for k in turns
            )
        if name == "divmod":
            return self._divides(use, self._constant(use, 1), sized, True)
        return name == "bool" and self._of_truth(use, sized)

    def _of_clip(self, use: Use, sized: list[int]) -> bool:
        return self._limit(self._numbers(use, 0), abs(self._constant(use, 1)), 1)

    def _of_split(self, use: Use, sized: list[int]) -> bool:
        by: int = self._constant(use, 1)
        return all(self._limit(self._numbers(use, 0), k * by, 1) for k in (1, 2, 3))

    def _of_lookup(self, use: Use, sized: list[int]) -> bool:
        return False

    _of_text = _of_error = _of_lookup

    def _of_shapes(self, use: Use, sized: list[int]) -> bool:
        return self._alike(use, 0, 1)

    def _of_match(self, use: Use, sized: list[int]) -> bool:
        node: ast.Match = use.node  # type: ignore[assignment]
        numbers = list[int]()
        for case in node.cases:
            for part in ast.walk(case.pattern):
                if isinstance(part, ast.MatchValue) and isinstance(part.value, ast.Constant):
                    numbers.append(part.value.value)  # type: ignore[arg-type]
                elif not isinstance(part, (ast.MatchOr, ast.MatchAs, ast.expr, ast.expr_context)):
                    return False
        values = self._numbers(use, 0)
        return all(type(number) is int and self._limit(values, number) for number in numbers)

    # operands as functions of the input's sizes

    def _is_size(self, use: Use, n: int, depth: int = 4) -> bool:
        """Whether an operand depends on the sizes alone."""
        held = [call.seen.values.get((use, n), set()) for call in self._calls]
        if depth and any(is_unknown(value) for values in held for value in values):
            if any(self._makes_size(part, depth - 1) for part in parts_of(use.operands[n], use.assigned)):
                return True
        orders = [call.seen.orders.get((use, n)) for call in self._calls]
        by_data = any(orders[a] != orders[b] and len(held[a]) > 1 for a, b in self._pairs)
        return not by_data and self._depends(held)

    def _makes_size(self, part: ast.AST, depth: int) -> bool:
        """Whether a part of an operand that cannot be looked up is computed from sizes."""
        name = called(part) if isinstance(part, ast.Call) else getattr(part, "attr", _NAMELESS.get(type(part), ""))
        if self._returns_size(name) or (isinstance(part, ast.Attribute) and name in self._stored):
            return True
        known = self._by_node.get(part)
        return known is not None and any(self._is_size(known, n, depth) for n in range(len(known.operands)))

    def _returns_size(self, name: str) -> bool:
        """Whether a function of the model returns a number that depends on the sizes alone."""
        return self._depends([call.seen.returned.get(name, set()) for call in self._calls])

    def _depends(self, held: list[set[Any]]) -> bool:
        """Whether values differ between calls, and not between calls of equal sizes."""
        if any(held[a] and held[b] and held[a] != held[b] for a, b in self._pairs):
            return False
        seen = [values for values in held if values]
        return any(values != seen[0] for values in seen)

    def _constant(self, use: Use, n: int) -> PyObject:
        """The one value of an operand in all calls; None where it had several."""
        held = set().union(*(call.seen.values.get((use, n), set()) for call in self._calls))
        return next(iter(held)) if len(held) == 1 else None

    def _numbers(self, use: Use, n: int) -> list[dict[int, Fraction]]:
        """By call, the number of an operand; [] where it is no number. Where each call had the same count of numbers
        (0 and the number of rows, if all tokens choose the same experts), a dict for each, the least first."""
        held = {at: c.seen.values[(use, n)] for at, c in enumerate(self._calls) if (use, n) in c.seen.values}
        plain = all(isinstance(v, (int, float)) and math.isfinite(v) for values in held.values() for v in values)
        if not plain or len(counts := {*map(len, held.values())}) != 1 or max(counts) > _SEVERAL:
            return []
        ordered = {at: sorted(map(Fraction, values)) for at, values in held.items()}
        return [{at: values[k] for at, values in ordered.items()} for k in range(max(counts))]

    def _forms(self, values: dict[int, Fraction]) -> Iterator[tuple[int, Fraction, Fraction]]:
        """(number of a size, a, b) for each size of which ``values`` are the linear function a * size + b."""
        for q in range(len(self._found)):
            points = {self._calls[at].sizes[q]: v for at, v in values.items()}
            fewest = 2 if all(size == value for size, value in points.items()) else 3  # two suffice for the size itself
            if len(points) < fewest or any(points[self._calls[at].sizes[q]] != v for at, v in values.items()):
                continue
            (x0, y0), (x1, y1) = [*points.items()][:2]
            a = (y1 - y0) / (x1 - x0)
            if all(y == y0 + a * (x - x0) for x, y in points.items()):
                yield q, a, y0 - a * x0

    def _limit(self, numbers: Sequence[dict[int, Fraction]], number: float, side: int = 0) -> bool:
        """Record where ``numbers`` pass ``number``; False where they are no linear functions of the sizes.

        ``side`` is 1 where the code treats equal like less, -1 where it treats equal like greater, else 0.
        """
        known = [list(self._forms(values)) for values in numbers]
        for q, a, b in itertools.chain(*known):
            at = (Fraction(number) - b) / a if a else Fraction(0)
            toward = side if a > 0 else -side
            self._found[q].limits |= {math.floor(at) + 0.5} if a and toward >= 0 else set()
            self._found[q].limits |= {math.ceil(at) - 0.5} if a and toward <= 0 else set()
        return bool(known) and all(known)

    def _crosses(self, use: Use, n: int, m: int, side: int) -> bool:
        """Record where one operand passes the other."""
        if all(self._is_remainder(use.operands[k], use) for k in (n, m) if self._is_size(use, k)):
            return True
        pairs = itertools.product(self._numbers(use, n), self._numbers(use, m))
        apart = [{at: one[at] - other[at] for at in one if at in other} for one, other in pairs]
        return self._limit(apart, 0, side) if apart else self._alike(use, n, m)

    def _alike(self, use: Use, n: int, m: int) -> bool:
        """Whether two operands are equal in every call, as two shapes are that always belong together."""
        values = [(c.seen.values.get((use, n)), c.seen.values.get((use, m))) for c in self._calls]
        return all(a == b for a, b in values)

    def _divides(self, use: Use, by: PyObject, sized: list[int], quotient: bool = False) -> bool:
        """Record the divisor of the first operand, and where its ``quotient``, a number of chunks, is 1, 2 and 3."""
        if sized != [0] or type(by) is not int or not 0 < by <= _LARGEST:
            return False
        if self._is_remainder(use.operands[0], use):
            return True
        numbers = self._numbers(use, 0)
        known = [list(self._forms(values)) for values in numbers]
        for q, a, b in itertools.chain(*known):
            self._found[q].divisors.add(by * math.lcm(a.denominator, b.denominator))
        limits = [self._limit(numbers, k * by, -1) for k in (1, 2, 3) if quotient]
        return bool(known) and all([*known, *limits])

    def _is_remainder(self, node: ast.expr, use: Use, depth: int = 8) -> bool:
        """Whether an operand is computed from remainders of sizes, which have classes of their own."""
        node = node.value if isinstance(node, (ast.NamedExpr, Item)) else node
        if isinstance(node, ast.Name):
            return depth > 0 and node.id in use.assigned and self._is_remainder(use.assigned[node.id], use, depth - 1)
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, (ast.Mod, ast.BitAnd)):
                return True  # the expression itself is read too, and has classes or has none
            parts = [node.left, node.right]
            return all(isinstance(p, ast.Constant) or self._is_remainder(p, use, depth - 1) for p in parts)
        if isinstance(node, ast.UnaryOp):
            return self._is_remainder(node.operand, use, depth - 1)
        return False


def _place(use: Use) -> tuple[int, int]:
    return (use.node.lineno, use.node.col_offset)  # type: ignore[attr-defined]
