"""Expressions in a model's source that compute something of numbers which a graph does not follow if they are sizes.

A graph holds sizes as sums and products of the input's: what PyTorch is given. Comparisons, remainders, bits, lookups,
text and functions of Python's own are taken as they came out when the block was recorded. They are found in the source
here, and whether their operands are sizes is looked at when they run (:mod:`moeopt.control_flow.size_values`).
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
"""Truths themselves, made of what is read by itself."""
_WITHIN = " \t#)]}@"
"""What a line begins with that goes on with a statement, or stands before it."""
FOLLOWED = frozenset((
    "float", "len", "list", "tuple", "slice", "isinstance", "issubclass", "hasattr", "callable", "type", "id",
    "print", "enumerate", "zip", "reversed", "setattr", "super", "warn", "debug", "info", "warning", "error", "log",
    "exception", "append",
))  # fmt: skip
"""Functions that give numbers as they are, or tell something."""
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSIONS: dict[type, str] = {ast.GeneratorExp: "<genexpr>", ast.Lambda: "<lambda>"}
if sys.version_info < (3, 12):  # later they are part of the code around them
    _COMPREHENSIONS |= {ast.ListComp: "<listcomp>", ast.SetComp: "<setcomp>", ast.DictComp: "<dictcomp>"}
_OF_SHAPES = ("equal", "is_same_size", "array_equal")
"""Functions that tell whether shapes are the same."""


class Item(ast.expr):
    """The number in ``value``, of a tensor without dims too: what Python asks of one is on no tape."""

    _fields = ("value",)

    def __init__(self, value: ast.expr) -> None:
        super().__init__()
        self.value = value


class SizesOf(Item):
    """The sizes of the tensor ``value``, which code may ask for without a word of them."""


@dataclass(frozen=True, eq=False)
class Use:
    """One such expression.

    Attributes:
        kind: "compare", "divide", "bits", "truth", "call", "lookup", "clip", "text", "match", "shapes", "error",
            "split" or "store".
        node: the whole of it.
        operands: what may be a size.
        assigned: expressions of names that are assigned once in its function.
        erring: whether it decides whether there is an error, and no more.
        owner: the name of the code that it is in: other code of its lines has other names in its frames.
    """

    kind: str
    node: ast.AST
    operands: tuple[ast.expr, ...]
    assigned: dict[str, ast.expr]
    erring: bool = False
    owner: str = ""


def uses_in(file: str, line: int) -> dict[int, list[Use]] | None:
    """The expressions by their lines in the class or function of a file that ``line`` is in, whatever else it is in;
    None where its source is not to be had."""
    found = _read(file, line)
    return None if found is None else found.uses


def lines_that_catch(file: str, line: int) -> frozenset[int]:
    """The lines behind whose errors the same class or function goes on."""
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
    """From where to where a file's outermost statement goes that line ``at`` is in, by how its lines are indented.

    A file is many times as large when it is parsed. A text whose lines begin at the margin cuts this short.
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
    """While open, a file is parsed once; the trees, many times the size of their text, are let go of behind it."""
    try:
        yield
    finally:
        _uses.cache_clear()


@dataclass(frozen=True)
class _SourceUses:
    """What is found in a source: its expressions by their lines, the lines on which others than texts begin, and those
    behind whose errors it goes on."""

    uses: dict[int, list[Use]]
    lines: frozenset[int]
    catching: frozenset[int]


@functools.lru_cache(maxsize=64)
def _uses(source: str, begin: int) -> _SourceUses | None:
    """The expressions of a source that begins behind line ``begin``."""
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
    """What of a function or a comprehension runs in the code around it."""
    if type(node) in _COMPREHENSIONS and not isinstance(node, ast.Lambda):
        return [node.generators[0].iter]  # type: ignore[attr-defined]
    return [node.args, *getattr(node, "decorator_list", ())] if isinstance(node, (*_NAMED[:2], ast.Lambda)) else []


def _inside(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """The children of ``node`` that may decide numbers, and whether they decide no more than an error."""
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
    """Of what is looked up, matched, written into text or stored."""
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
    """What ``node`` takes the truth of."""
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
    """What is set to what."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        yield from zip(target.elts, value.elts, strict=True)
    else:
        yield target, value


def _keys(index: ast.expr) -> list[ast.expr]:
    if isinstance(index, ast.Slice):
        return [part for part in (index.lower, index.upper, index.step) if part is not None]
    return [key for part in index.elts for key in _keys(part)] if isinstance(index, ast.Tuple) else [index]


def parts_of(node: ast.AST, assigned: dict[str, ast.expr], depth: int = 4) -> Iterator[ast.AST]:
    """The expressions in ``node``, and in what its names are assigned."""
    for part in ast.walk(node):
        yield part
        if isinstance(part, ast.Name) and depth and part.id in assigned:
            yield from parts_of(assigned[part.id], assigned, depth - 1)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)
