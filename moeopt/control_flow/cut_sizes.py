"""Sizes that decide a result without a condition: x[:64] has fewer rows if x is short, x.split(64) has fewer parts."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from moeopt.control_flow.decisive_values import called


def clipped(node: ast.Subscript) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(size, bound) of each slice: where a tensor has less than 200 columns, ``x[:, 200:]`` is empty."""
    for dim, part in enumerate(node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]):
        if not isinstance(part, ast.Slice) and not (isinstance(part, ast.Constant) and type(part.value) is int):
            return
        size: ast.expr = ast.Subscript(ast.Attribute(node.value, "shape", ast.Load()), ast.Constant(dim), ast.Load())
        size = size if dim else ast.Call(ast.Name("len", ast.Load()), [node.value], [])  # of lists too
        bounds = [part.lower, part.upper] if isinstance(part, ast.Slice) else []
        yield from ((size, bound) for bound in bounds if bound is not None)


def split(node: ast.Call) -> tuple[ast.expr, ast.expr] | None:
    """(size of the tensor, size of a part) where a call splits a tensor into equal parts; None for any other call.

    A text that is split and a list of sizes have the same form, and no whole number in the second place.
    """
    if called(node) != "split":
        return None
    named = {k.arg: k.value for k in node.keywords}
    args = [*node.args]
    if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") != "torch":
        args.insert(0, node.func.value)
    of = args[0] if args else named.get("tensor")
    by = args[1] if len(args) > 1 else named.get("split_size", named.get("split_size_or_sections"))
    if of is None or by is None:
        return None
    dim = args[2] if len(args) > 2 else named.get("dim", ast.Constant(0))
    return ast.Subscript(ast.Attribute(of, "shape", ast.Load()), dim, ast.Load()), by
