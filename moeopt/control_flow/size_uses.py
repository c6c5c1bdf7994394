"""Expressions in a model's source whose result a graph holds as a constant, although sizes may decide it.

A graph computes sizes as sums and products of the input's sizes. The result of a comparison, a remainder, a bit
operation, a lookup, a text or a Python function is the constant that it was when the block was recorded. This file
finds such expressions in the source; whether their operands are sizes is seen when they run
(:mod:`moeopt.control_flow.size_values`).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from moeopt.control_flow.caught_errors import caught, caught_of_tensors, only_errs
from moeopt.control_flow.cut_sizes import clipped, split
from moeopt.control_flow.decisive_values import called
from moeopt.control_flow.untaken_branches import assigned_once

_DIVIDES = (ast.Mod, ast.FloorDiv)
_BITS = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.LShift, ast.RShift, ast.Pow)
_TRUTHS = (ast.Compare, ast.BoolOp, ast.Constant)
"""Conditions that are read by their parts, so that the whole needs no entry."""
_WITHIN = " \t#)]}@"
"""First characters of a line that continues a statement, or is a decorator or a comment before one."""
FOLLOWED = frozenset((
    "float", "len", "list", "tuple", "slice", "isinstance", "issubclass", "hasattr", "callable", "type", "id",
    "print", "enumerate", "zip", "reversed", "setattr", "super", "warn", "debug", "info", "warning", "error", "log",
    "exception", "append",
))  # fmt: skip
"""Functions that pass numbers through unchanged, or only print a message."""
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSIONS: dict[type, str] = {ast.GeneratorExp: "<genexpr>", ast.Lambda: "<lambda>"}
if sys.version_info < (3, 12):  # from 3.12 on a comprehension runs in the frame around it
    _COMPREHENSIONS |= {ast.ListComp: "<listcomp>", ast.SetComp: "<setcomp>", ast.DictComp: "<dictcomp>"}
_OF_SHAPES = ("equal", "is_same_size", "array_equal")
"""Functions whose result depends on whether two shapes are equal."""


class Item(ast.expr):
    """The number in ``value``, also where that is a tensor without dimensions: Python reads it off the tape."""

    _fields = ("value",)

    def __init__(self, value: ast.expr) -> None:
        super().__init__()
        self.value = value


class SizesOf(Item):
    """The sizes of the tensor ``value``, read by code that does not name them."""


@dataclass(frozen=True, eq=False)
class Use:
    """One expression whose result is a constant of the graph.

    Attributes:
        kind: "compare", "divide", "bits", "truth", "call", "lookup", "clip", "text", "match", "shapes", "error",
            "split" or "store".
        node: the expression.
        operands: the parts that may be sizes.
        assigned: for each name that its function assigns once, the assigned expression.
        erring: whether it only decides if an error is raised.
        owner: the name of the code object that runs it: a nested function on the same line has another frame.
    """

    kind: str
    node: ast.AST
    operands: tuple[ast.expr, ...]
    assigned: dict[str, ast.expr]
    erring: bool = False
    owner: str = ""


def uses_in(file: str, line: int) -> dict[int, list[Use]] | None:
    """By line, the expressions of the outermost class or function around ``line``; None where there is no source."""
    found = _read(file, line)
    return None if found is None else found.uses


def lines_that_catch(file: str, line: int) -> frozenset[int]:
    """The lines whose errors the same class or function catches."""
    found = _read(file, line)
    return frozenset() if found is None else found.catching


def _read(file: str, line: int) -> _SourceUses | None:
    lines = linecache.getlines(file)
    if not lines:
        return None
    begin, end = _outermost(lines, line - 1)
    found = _uses("".join(lines[begin:end]), begin)
    if found is None or line not in found.lines:
        found = _uses("".join(lines), 0)
    return found


def _outermost(lines: list[str], at: int) -> tuple[int, int]:
    """The range of lines of the outermost statement around line ``at``, by indentation.

    A syntax tree takes many times the memory of its text, so only this part of a file is parsed. A multi-line string
    with lines at the margin ends the range too early; the caller then parses the whole file.
    """

    def inside(n: int) -> bool:
        return not lines[n].strip() or lines[n][0] in _WITHIN

    begin, end = min(at, len(lines) - 1), at + 1
    while begin > 0 and (inside(begin) or lines[begin - 1][0] == "@"):
        begin -= 1
    while end < len(lines) and (inside(end) or lines[end - 1][0] == "@"):
        end += 1
    return max(begin, 0), end


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """While open, each file is parsed once; the syntax trees, which are large, are freed at the end."""
    try:
        yield
    finally:
        _uses.cache_clear()


@dataclass(frozen=True)
class _SourceUses:
    """What one source holds.

    Attributes:
        uses: its expressions, by line.
        lines: on which a node other than a constant begins.
        catching: whose errors the source catches.
    """

    uses: dict[int, list[Use]]
    lines: frozenset[int]
    catching: frozenset[int]


@functools.lru_cache(maxsize=64)
def _uses(source: str, begin: int) -> _SourceUses | None:
    """The expressions of ``source``, whose first line is number ``begin + 1`` of its file."""
    try:
        tree = ast.increment_lineno(ast.parse(source), begin)
    except (SyntaxError, ValueError):
        return None
    found: dict[int, list[Use]] = {}
    around: dict[ast.AST, str] = {}
    pending: list[tuple[ast.AST, dict[str, ast.expr], bool, str]] = [(tree, {}, False, "<module>")]
    while pending:
        node, assigned, erring, owner = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            assigned = assigned_once(node)
        errs = erring or only_errs(node)
        for kind, at, operands in _of(node):
            found.setdefault(getattr(at, "lineno", 0), []).append(Use(kind, at, tuple(operands), assigned, errs, owner))
        around |= {part: owner for part in _around(node)}
        own = _COMPREHENSIONS.get(type(node)) or (node.name if isinstance(node, _NAMED) else owner)
        for child, child_errs in _inside(node):
            pending.append((child, assigned, child_errs or erring, around.get(child, own)))
    nodes = [*ast.walk(tree)]
    tried = [part for node in nodes for part in caught(node)]
    catching = {line for part in tried for line in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
    for statement in itertools.chain.from_iterable(map(caught_of_tensors, nodes)):
        names = (part for part in ast.walk(statement) if isinstance(part, (ast.Name, ast.Attribute)))
        loaded = tuple(SizesOf(part) for part in names if isinstance(part.ctx, ast.Load))
        found.setdefault(statement.lineno, []).append(Use("error", statement, loaded, {}))
    lines = (node.lineno for node in nodes if not isinstance(node, ast.Constant) and hasattr(node, "lineno"))
    return _SourceUses(found, frozenset(lines), frozenset(catching))


def _around(node: ast.AST) -> list[ast.AST]:
    """The parts of a function or a comprehension that run in the frame around it: defaults, decorators, iterable."""
    if type(node) in _COMPREHENSIONS and not isinstance(node, ast.Lambda):
        return [node.generators[0].iter]  # type: ignore[attr-defined]
    return [node.args, *getattr(node, "decorator_list", ())] if isinstance(node, (*_NAMED[:2], ast.Lambda)) else []


def _inside(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """The children of ``node`` that may decide numbers, and whether they only decide if an error is raised."""
    if isinstance(node, ast.Raise):
        return
    if isinstance(node, ast.Assert):
        yield node.test, True
    elif isinstance(node, ast.Call) and called(node) in FOLLOWED and any(_is_text(arg) for arg in node.args):
        return  # a message
    else:
        rest = node.orelse if isinstance(node, ast.If) else []
        yield from ((child, only_errs(node) and child not in rest) for child in ast.iter_child_nodes(node))


def _of(node: ast.AST) -> Iterator[tuple[str, ast.AST, list[ast.expr]]]:
    if isinstance(node, ast.Compare):
        yield "compare", node, [node.left, *node.comparators]
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, (*_DIVIDES, *_BITS)):
        left, right = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
        whole = node if isinstance(node, ast.BinOp) else ast.copy_location(ast.BinOp(left, node.op, right), node)
        kind = "divide" if isinstance(node.op, _DIVIDES) else "bits"
        yield kind, whole, [left, right]
        yield kind, whole, [Item(left), Item(right)]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        yield "bits", node, [node.operand]
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    else:
        yield from _of_places(node)
    for test in _tested(node):
        one = test.func.value if isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) else test
        one = one if isinstance(one, ast.Compare) else test
        if isinstance(one, ast.Compare):
            yield "compare", one, [Item(part) for part in (one.left, *one.comparators)]
        elif not isinstance(one, _TRUTHS):
            yield "truth", one, [one]
            yield "truth", one, [Item(one)]


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST, list[ast.expr]]]:
    if called(node) == "int" and node.args:
        at = node.args[0]
        if isinstance(at, ast.BinOp) and isinstance(at.op, ast.Div):
            yield "divide", node, [Item(at.left), Item(at.right)]
        else:
            yield "call", node, [Item(at)]
    elif (pieces := split(node)) is not None:
        yield "split", node, [*pieces]
    elif called(node) in _OF_SHAPES:
        held = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        yield "shapes", node, [*map(SizesOf, [*held, *node.args][-2:])]
    elif called(node) not in FOLLOWED:
        held = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        yield "call", node, [*held, *node.args, *(k.value for k in node.keywords)]


def _of_places(node: ast.AST) -> Iterator[tuple[str, ast.AST, list[ast.expr]]]:
    """The entries for a subscript, a formatted text, a match statement or an attribute that is assigned."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        yield "lookup", node, _keys(node.slice)
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Store):
        yield from (("clip", node, [size, bound]) for size, bound in clipped(node))
    elif isinstance(node, ast.JoinedStr):  # whose parts have lines of their own from Python 3.12 on only
        yield "text", node, [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
    elif isinstance(node, ast.Match):
        yield "match", node, [node.subject]
        named = (part for case in node.cases for part in ast.walk(case.pattern) if isinstance(part, ast.MatchClass))
        names = [name for part in named for name in (*part.kwd_attrs, "__dict__")]
        told: list[ast.expr] = [ast.Attribute(node.subject, name, ast.Load()) for name in names]
        if any(isinstance(part, ast.MatchSequence) for case in node.cases for part in ast.walk(case.pattern)):
            told.append(ast.Call(ast.Name("len", ast.Load()), [node.subject], []))
        yield "lookup", node, [ast.copy_location(one, node.subject) for one in told]
    elif isinstance(node, ast.Assign):
        pairs = [pair for target in node.targets for pair in _assigned(target, node.value)]
        yield from (("store", target, [value]) for target, value in pairs if isinstance(target, ast.Attribute))


def _tested(node: ast.AST) -> list[ast.expr]:
    """The expressions that ``node`` uses as conditions."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [node.operand]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        return [node.test]
    if isinstance(node, ast.match_case) and node.guard is not None:
        return [node.guard]
    if isinstance(node, ast.Call) and called(node) == "bool":
        return node.args[:1]
    return node.ifs if isinstance(node, ast.comprehension) else []


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Pairs of a target and the expression assigned to it."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        yield from zip(target.elts, value.elts, strict=True)
    else:
        yield target, value


def _keys(index: ast.expr) -> list[ast.expr]:
    if isinstance(index, ast.Slice):
        return [part for part in (index.lower, index.upper, index.step) if part is not None]
    return [key for part in index.elts for key in _keys(part)] if isinstance(index, ast.Tuple) else [index]


def parts_of(node: ast.AST, assigned: dict[str, ast.expr], depth: int = 4) -> Iterator[ast.AST]:
    """The expressions in ``node``, and in the expressions assigned to its names."""
    for part in ast.walk(node):
        yield part
        if isinstance(part, ast.Name) and depth and part.id in assigned:
            yield from parts_of(assigned[part.id], assigned, depth - 1)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)
