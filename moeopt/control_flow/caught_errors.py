"""Errors that a model's code catches: what decides whether one is raised decides numbers there.

    try:
        y = fast(x)                     # if len(x) > 64: raise ValueError
    except ValueError:
        y = slow(x)

Elsewhere a size that raises an error has no result to compare.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from moeopt.control_flow.decisive_values import called

_NOT_OF_SIZES = frozenset(
    "ImportError ModuleNotFoundError AttributeError NotImplementedError TypeError NameError StopIteration KeyError "
    "StopAsyncIteration OSError".split()
)
"""Errors that PyTorch does not raise for the sizes of tensors."""
_PLAIN = (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)
_MAY_FAIL = (ast.Call, ast.Subscript, ast.BinOp)


def only_errs(node: ast.AST) -> bool:
    """Whether ``node`` tests a condition only to raise an error."""
    return isinstance(node, ast.Assert) or isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)


def caught(node: ast.AST) -> list[ast.stmt]:
    """The statements of ``node`` whose errors it catches and survives."""
    return [] if _handled(node) is None else node.body  # type: ignore[attr-defined]


def caught_of_tensors(node: ast.AST) -> Iterator[ast.stmt]:
    """The caught statements in which an operation on tensors may fail because of their sizes."""
    handled = _handled(node)
    if handled is None or handled <= _NOT_OF_SIZES:
        return
    for part in (part for statement in caught(node) for part in ast.walk(statement)):
        if isinstance(part, _PLAIN) and any(isinstance(one, _MAY_FAIL) for one in ast.walk(part)):
            yield part


def _handled(node: ast.AST) -> set[str] | None:
    """The names of the errors that ``node`` catches and survives, "" for all errors; None where it catches none."""
    if isinstance(node, (ast.With, ast.AsyncWith)):
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        kinds = [call.args for call in calls if called(call) == "suppress"]
        return {name for args in kinds for arg in args for name in _names(arg)} if kinds else None
    if isinstance(node, ast.Try) or type(node).__name__ == "TryStar":
        goes_on = [handler for handler in node.handlers if not isinstance(handler.body[-1], ast.Raise)]  # type: ignore[attr-defined]
        return {name for handler in goes_on for name in _names(handler.type)} if goes_on else None
    return None


def _names(kinds: ast.expr | None) -> list[str]:
    if isinstance(kinds, ast.Tuple):
        return [name for kind in kinds.elts for name in _names(kind)]
    return [kinds.attr if isinstance(kinds, ast.Attribute) else getattr(kinds, "id", "")]
