"""Optimization profiles: the sizes that an engine is built for, from the example inputs or from the user.

TensorRT wants the least, the best and the largest shape of each input with free sizes. By default a free size is

    least   what the traced model allows, mostly 1
    best    what the example has
    most    four times what the example has; the longest free size of the example at least the largest of ``tokens``

The user gives others by input, as ``trtexec`` takes them: ``profile={"x": ((1, 1, 64), (1, 128, 64), (4, 512, 64))}``,
or a tuple of such mappings for several profiles. Sizes of inputs that are not named follow where they are the same
size in the model. A size that is arithmetic on others, like "past + new", is computed.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

MULTIPLE = 4
Triple = tuple[int, int, int]
Ends = Mapping[str, Sequence[Any]]
"""The graph's inputs: a number, or a free size's name or formula, for each axis."""
Profile = dict[str, tuple[tuple[int, ...], ...]]
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def default_sizes(
    ends: Ends,
    example: Mapping[str, Sequence[int]],
    ranges: Mapping[str, Sequence[int | None]],
    tokens: Sequence[int] | None = None,
) -> dict[str, Triple]:
    """Least, best and most of each free size; ``ranges`` are what the traced model holds for."""
    found = {
        dim: size
        for name, shape in ends.items()
        for dim, size in zip(shape, example[name], strict=True)
        if isinstance(dim, str) and dim.isidentifier()
    }
    longest = max(found, key=lambda dim: found[dim], default=None)
    sizes: dict[str, Triple] = {}
    for dim, best in found.items():
        low, high = ranges.get(dim, (1, None))
        max_size = MULTIPLE * best
        if dim == longest and tokens:
            max_size = max(max_size, *tokens)
        sizes[dim] = (min(max(1, low or 0), best), best, max(best, max_size if high is None else min(max_size, high)))
    return sizes


def profiles_for(ends: Ends, sizes: Mapping[str, Triple], given: PyObject = None) -> list[Profile]:
    """The profiles that the user gave, completed by ``sizes``; one of ``sizes`` alone where none was given.

    Raises:
        UsageError: a profile that does not fit the graph's inputs; a size that nothing determines.
    """
    if given is None:
        return [_profile(ends, sizes, {})] if _free(ends) else []
    every = (given,) if isinstance(given, Mapping) else tuple(given)
    return [_profile(ends, sizes, _read(ends, one)) for one in every]


def fits(profile: Mapping[str, Sequence[Sequence[int]]], shapes: Mapping[str, Sequence[int]]) -> str:
    """Why inputs of these shapes are outside a profile; "" when they are inside."""
    for name, (min_size, _, max_size) in profile.items():
        for axis, (low, size, high) in enumerate(zip(min_size, shapes[name], max_size, strict=True)):
            if not low <= size <= high:
                return f"{name} has size {size} at axis {axis}, and the engine was built for {low} to {high}"
    return ""


def _profile(ends: Ends, sizes: Mapping[str, Triple], given: Mapping[str, tuple[tuple[int, ...], ...]]) -> Profile:
    told = dict(sizes)
    seen: dict[str, tuple[str, Triple]] = {}
    for name, shapes in given.items():
        for axis, dim in enumerate(ends[name]):
            triple = (shapes[0][axis], shapes[1][axis], shapes[2][axis])
            if isinstance(dim, str) and dim.isidentifier():
                other, before = seen.setdefault(dim, (name, triple))
                if before != triple:
                    raise UsageError(
                        f"profile: {name} has {triple} at axis {axis}, and {other} has {before} for the same size"
                    )
                told[dim] = triple
    made: Profile = {}
    for name in _free(ends):
        if name in given:
            made[name] = given[name]
            continue
        columns = [_triple(dim, told, name, axis) for axis, dim in enumerate(ends[name])]
        made[name] = tuple(tuple(column[n] for column in columns) for n in range(3))
    return made


def _free(ends: Ends) -> list[str]:
    return [name for name, shape in ends.items() if any(not isinstance(dim, int) for dim in shape)]


def _triple(dim: PyObject, sizes: Mapping[str, Triple], name: str, axis: int) -> Triple:
    if isinstance(dim, int):
        return dim, dim, dim
    try:
        min_size, best, max_size = (_value(ast.parse(str(dim), mode="eval").body, sizes, n) for n in range(3))
    except (KeyError, SyntaxError, TypeError):
        raise UsageError(
            f"axis {axis} of the input {name} is {dim!r}, which the example does not determine: "
            f"give profile={{{name!r}: (the least shape, the best, the largest)}}"
        ) from None
    return min(min_size, max_size), best, max(min_size, max_size)


def _value(node: ast.AST, sizes: Mapping[str, Triple], which: int) -> int:
    """Arithmetic on sizes; ``KeyError`` for a size or an operator that is not known."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id][which]
    if isinstance(node, ast.BinOp):
        return int(_ARITHMETIC[type(node.op)](*(_value(side, sizes, which) for side in (node.left, node.right))))
    raise KeyError(ast.dump(node))


def _read(ends: Ends, one: PyObject) -> dict[str, tuple[tuple[int, ...], ...]]:
    """A user's profile, held to the inputs' names, ranks and fixed sizes."""
    if not isinstance(one, Mapping):
        raise UsageError(f"profile={one!r}: it must map an input's name to its least, best and largest shape")
    out: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, shapes in one.items():
        if name not in ends:
            close = difflib.get_close_matches(str(name), list(ends), n=1)
            raise UsageError(
                f"profile: the model has no input {name!r}; "
                + (f"did you mean {close[0]!r}?" if close else f"it has {', '.join(ends)}")
            )
        try:
            three = tuple(tuple(int(size) for size in shape) for shape in shapes)
        except (TypeError, ValueError):
            three = ()
        if len(three) != 3 or any(len(shape) != len(ends[name]) for shape in three):
            raise UsageError(
                f"profile[{name!r}]={shapes!r}: it must be three shapes of {len(ends[name])} sizes: the least, the "
                "best and the largest"
            )
        for axis, dim in enumerate(ends[name]):
            low, best, high = (shape[axis] for shape in three)
            if not 0 <= low <= best <= high or (isinstance(dim, int) and {low, best, high} != {dim}):
                want = f"the model fixes it to {dim}" if isinstance(dim, int) else "they must not fall"
                raise UsageError(f"profile[{name!r}] has the sizes {low}, {best}, {high} at axis {axis}: {want}")
        out[name] = three
    return out
