"""Conditions in a model's code that had one answer in every case of verification, and that input values decide.

Calls of equal shapes and different values tell which conditions these are: ``len(x) > 4`` and ``self.normalise`` read
the same operands in all of them, ``int(ids.max()) < 4`` does not. The conditions of a dispatch are left out: whether an
expert has tokens, and whether an id names an expert.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import operator
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeopt.control_flow.branches_taken import BranchesTaken, BranchPlace, Position
from moeopt.control_flow.decisive_values import Results, Scope, position
from moeopt.value_types import PyObject

RunWatched = Callable[..., Any]
"""Calls a function while its conditions are watched."""
_Seen = dict[tuple[BranchPlace, str], set[Any]]
"""Of one call, the values of each operand of a condition, by the condition and the operand's source text."""
_ASKS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_MANY = 6
"""So many different numbers, all of them below the number of experts, are ids of experts and no counts of tokens."""


@dataclass(frozen=True)
class DispatchFacts:
    """What is known about a block's dispatch.

    Attributes:
        experts: the number of experts.
        every: whether every expert has tokens in every call.
        most: the largest number of tokens for which the rewritten code runs; None where there is no bound.
    """

    experts: int
    every: bool
    most: int | None


@dataclass(frozen=True)
class UntakenBranch:
    """A condition with one answer: its source text, the answer, and its line."""

    text: str
    answer: bool
    line: str


@dataclass(frozen=True)
class _Test:
    """A condition in the source.

    Attributes:
        around: the nodes around it, the innermost first.
        assigned: for each name that its function assigns once, the assigned expression.
    """

    node: ast.expr
    around: tuple[ast.AST, ...]
    assigned: dict[str, ast.expr]


def untaken(
    taken: BranchesTaken, groups: Iterable[Iterable[Callable[[RunWatched], object]]], dispatch: DispatchFacts
) -> Iterator[UntakenBranch]:
    """The conditions of ``taken`` with a branch that no case took, although some input may take it.

    Args:
        groups: in each group, calls of equal shapes and different values, which run the model watched.
    """
    one_sided = {place: test for place, said in taken.answers.items() if len(said) == 1 and (test := _test(place))}
    one_sided = {place: test for place, test in one_sided.items() if not _raises(test)}
    if not one_sided:
        return
    watched = [[_decided_by(one_sided, call) for call in calls] for calls in groups]
    varied = {key for calls in watched for key in _varied(calls)}
    for place, test in one_sided.items():
        parts = [text for at, text in varied if at == place]
        answer = next(iter(taken.answers[place]))
        if parts and not _asked_by_dispatch(test, place, [seen for calls in watched for seen in calls], dispatch):
            yield UntakenBranch(ast.unparse(test.node)[:80], answer, f"{place[0].co_filename}:{test.node.lineno}")


def _decided_by(tests: dict[BranchPlace, _Test], call: Callable[[RunWatched], object]) -> _Seen:
    """The operands of each of ``tests`` in ``call``, up to an error of the model's code."""
    seen: _Seen = defaultdict(set)

    def look(place: BranchPlace, frame: types.FrameType, into: BranchesTaken) -> None:
        test = tests[place]
        scope = Scope(frame.f_locals, frame.f_globals, test.assigned, lambda at: into.returned.get((frame.f_code, at)))
        for part, value in scope.decisive(test.node):
            seen[place, ast.unparse(part)].add(value)

    with contextlib.suppress(Exception):  # a call that the model does not take (one row, to a batch norm in training)
        call(BranchesTaken(look, frozenset(tests)).watching)
    return seen


def _varied(calls: list[_Seen]) -> Iterator[tuple[BranchPlace, str]]:
    """The operands whose values differed between the calls."""
    for key in {key for seen in calls for key in seen}:
        values = [seen[key] for seen in calls if key in seen]
        if any(one != values[0] for one in values):
            yield key


def _asked_by_dispatch(test: _Test, place: BranchPlace, calls: list[_Seen], dispatch: DispatchFacts) -> bool:
    """Whether a condition belongs to the dispatch: no input changes its answer, or the other answer changes nothing."""
    parts, ask = _question(test)
    known = [
        _constant(part) or {v for seen in calls for v in seen.get((place, ast.unparse(part)), ())} for part in parts
    ]
    if isinstance(test.around[0], ast.match_case) or (len(parts) > 1 and _compares_containers(set().union(*known))):
        return False
    varied = [n for n, values in enumerate(known) if len(values) > 1]
    bounds = [_length(next(iter(values), None)) for values in known]
    numbers = [_length(v) for n in varied for v in known[n]]
    if len(varied) != 1 or not all(type(n) is int for n in (*numbers, *bounds)):
        return False
    at = varied[0]

    def asked(number: int) -> bool:
        return ask([*bounds[:at], number, *bounds[at + 1 :]])

    some = [n for n in numbers if n]  # a call that shows nothing, all NaN, may have had none
    if some and min(some) > 0 and all(asked(0) is not asked(n) for n in some):  # has it any token?
        return dispatch.every or _passes_over(test) or all(isinstance(v, Results) for v in known[at])
    return _cannot_differ(asked, numbers, [*bounds[:at], *bounds[at + 1 :]], dispatch)


def _cannot_differ(
    asked: Callable[[int], bool], numbers: list[int], bounds: list[Any], dispatch: DispatchFacts
) -> bool:
    """Whether the answer is the same for the id of every expert, or for every possible number of tokens."""
    if _names_experts(numbers, dispatch.experts):
        return all(asked(e) is asked(max(numbers)) for e in range(dispatch.experts))
    return dispatch.most is not None and all(max(numbers) <= dispatch.most <= b for b in bounds)


def _compares_containers(held: set[Any]) -> bool:
    """Whether the items of lists are compared, and not only whether a list is empty."""
    return any(_length(v) is not v for v in held if isinstance(v, tuple)) and 0 not in map(_length, held)


def _names_experts(numbers: list[int], experts: int) -> bool:
    """Whether ``numbers`` are ids of experts and no counts of tokens, as far as their values tell."""
    if min(numbers) < 0 or max(numbers) >= experts:
        return False
    return max(numbers) == experts - 1 or len(set(numbers)) >= _MANY


def _question(test: _Test) -> tuple[list[ast.expr], Callable[[list[int]], bool]]:
    """The operands of a condition, and its predicate on their numbers; that of a bare value is ``!= 0``."""
    node = test.node
    while isinstance(node, ast.Name) and isinstance(test.assigned.get(node.id), ast.Compare):
        node = test.assigned[node.id]
    if not isinstance(node, ast.Compare) or any(type(op) not in _ASKS for op in node.ops):
        return [node], lambda numbers: numbers[0] != 0
    asks = [_ASKS[type(op)] for op in node.ops]
    return [node.left, *node.comparators], lambda numbers: all(map(_call, asks, numbers, numbers[1:]))


def _call(ask: Callable[[int, int], bool], a: int, b: int) -> bool:
    return ask(a, b)


def _constant(node: ast.expr) -> set[Any]:
    try:
        return {ast.literal_eval(node)}
    except (ValueError, TypeError):
        return set()


def _length(value: PyObject) -> PyObject:
    """The length in a container's fingerprint; a number as it is."""
    if isinstance(value, tuple) and value and type(value[0]) is int:
        return value[0]
    return int(value) if isinstance(value, (int, np.integer)) else value


def _passes_over(test: _Test) -> bool:
    """Whether the condition only decides if an item of a loop or a comprehension is skipped."""
    inner = next(one for one in test.around if not isinstance(one, (ast.BoolOp, ast.UnaryOp)))
    if isinstance(inner, ast.comprehension):
        return True
    if not isinstance(inner, ast.If) or not any(isinstance(one, (ast.For, ast.While)) for one in test.around):
        return False
    return not inner.orelse


def _raises(test: _Test) -> bool:
    """Whether the other branch raises an error, so that it returns no numbers."""
    for one in test.around:
        if isinstance(one, ast.match_case):
            return isinstance(one.body[-1], ast.Raise)
        if isinstance(one, ast.Assert):
            return True
        if isinstance(one, ast.If):
            return any(isinstance(suite[-1], ast.Raise) for suite in (one.body, one.orelse) if suite)
        if isinstance(one, ast.stmt):
            return False
    return False


def _test(place: BranchPlace) -> _Test | None:
    """The condition at ``place``; None where its source cannot be read."""
    code, at = place
    return _tests_of("".join(linecache.getlines(code.co_filename))).get(at) if len(at) > 1 else None


@functools.lru_cache(maxsize=16)
def _tests_of(source: str) -> dict[Position, _Test]:
    """The expressions of a source, by position."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {}
    found: dict[Position, _Test] = {}
    pending: list[tuple[ast.AST, tuple[ast.AST, ...], dict[str, ast.expr]]] = [(tree, (), {})]
    while pending:
        node, around, assigned = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assigned = assigned_once(node)
        if isinstance(node, ast.Match):
            found.update(_of_patterns(node, around, assigned))
        if isinstance(node, ast.expr):
            found.setdefault(position(node), _Test(node, around, assigned))
        pending += [(child, (node, *around), assigned) for child in ast.iter_child_nodes(node)]
    return found


def _of_patterns(node: ast.Match, around: tuple[ast.AST, ...], assigned: dict[str, ast.expr]) -> dict[Position, _Test]:
    """The subject of a match statement, by the position of each pattern and its parts."""
    return {
        position(part): _Test(node.subject, (case, node, *around), assigned)
        for case in node.cases
        for part in ast.walk(case.pattern)
        if isinstance(part, (ast.pattern, ast.expr))
    }


def assigned_once(function: ast.AST) -> dict[str, ast.expr]:
    """For each name that ``function`` assigns once, the assigned expression."""
    found: dict[str, ast.expr | None] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = None if node.id in found else ast.Constant(None)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            if found[node.targets[0].id] is not None:
                found[node.targets[0].id] = node.value
    return {name: value for name, value in found.items() if value is not None}
