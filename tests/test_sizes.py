"""A file holds one idea and a function can be read at once: the limits, which nothing exceeds."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1] / "moeopt"
LONGEST_FILE, LONGEST_FUNCTION, MOST_COMPLEX = 300, 60, 25

_DECISIONS = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.Assert)


def complexity(function: ast.AST) -> int:
    """Decision points of a function and of the functions inside it, plus 1 (McCabe)."""
    total = 1
    for node in ast.walk(function):
        total += isinstance(node, _DECISIONS)
        total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        total += len(node.ifs) if isinstance(node, ast.comprehension) else 0
        total += len(node.cases) if isinstance(node, ast.Match) else 0
    return total


@functools.cache  # not at import: each process that collects the suite would parse the whole package
def measured():
    """[(``file:function``, lines, complexity)] of every function, and [(file, lines)] of every file."""
    functions, files = [], []
    for path in sorted(ROOT.rglob("*.py")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        files.append((name, len(text.splitlines())))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                functions.append((f"{name}:{node.name}", lines, complexity(node)))
    return functions, files


def test_complexity_counts_each_decision():
    (function,) = ast.parse("def f(a):\n    if a and a > 1:\n        return [b for b in a if b]\n    return 0").body
    assert complexity(function) == 1 + 1 + 1 + 1 + 1  # if, and, for, if


def test_files_fit():
    assert not [(name, lines) for name, lines in measured()[1] if lines > LONGEST_FILE]


def test_functions_fit():
    assert not [(name, lines) for name, lines, _ in measured()[0] if lines > LONGEST_FUNCTION]


def test_functions_are_simple():
    assert not [(name, decisions) for name, _, decisions in measured()[0] if decisions > MOST_COMPLEX]
