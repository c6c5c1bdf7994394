"""The inputs of a file's graph: those that the user gives, or some made up of what the graph does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.onnx_in.ends import graph_inputs, tensor_type
from moeopt.onnx_in.read import OnnxFile
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxGraph, OnnxNode, PyObject

GraphFeeds = dict[str, Tensor]
ONE_MORE: Callable[[int], int] = (1).__add__
OTHER_SIZES: tuple[Callable[[int], int], ...] = (ONE_MORE, *((n).__mul__ for n in (2, 3, 4)), lambda n: max(n - 1, 1))
"""What a size may be changed to: a file may take multiples of its patches or windows alone."""
_VIEWS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Transpose", "Expand")


def given_feeds(file: OnnxFile, inputs: PyObject) -> GraphFeeds:
    """The user's inputs by name: a tensor, a tuple in the graph's order, or a mapping; NumPy arrays are taken too.

    Raises:
        UsageError: one is missing, unknown, or of another dtype or rank than the graph says.
    """
    wanted = graph_inputs(file.proto.graph)
    names = [value.name for value in wanted]
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    else:
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        if len(values) > len(names):
            raise UsageError(
                f"{file.name} takes {len(names)} inputs ({', '.join(names)}), and {len(values)} were given"
            )
        given = dict(zip(names, values, strict=False))
    wrong = sorted(set(given) ^ set(names))
    if wrong:
        raise UsageError(
            f"{file.name} takes {', '.join(names) or 'no inputs'}; {wrong[0]!r} is "
            f"{'no input of it' if wrong[0] in given else 'missing'}"
        )
    return {value.name: _checked(file, value, given[value.name]) for value in wanted}


def _checked(file: OnnxFile, value: PyObject, given: PyObject) -> Tensor:
    tensor = given if isinstance(given, Tensor) else torch.as_tensor(given)
    dtype, dims = tensor_type(file, value)
    if tensor.dtype != dtype or tensor.dim() != len(dims):
        raise UsageError(
            f"{file.name}: the input {value.name!r} is {dtype} with {len(dims)} dimensions, and was given as "
            f"{tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor


def made_up_feeds(file: OnnxFile, seed: int, samples: int = 2) -> Iterator[GraphFeeds]:
    """Guesses, the likeliest first: each in sizes of its own, so that two of them tell sizes from constants.

    ``samples``: as large is a batch where the file takes several.
    """
    shapes = [tensor_type(file, v)[1] for v in graph_inputs(file.proto.graph)]
    first = {shape[0] for shape in shapes if len(shape) > 1 and isinstance(shape[0], str)}
    symbols = {d for shape in shapes for d in shape if isinstance(d, str)}
    for batch, tokens, past in ((samples, 5, 3), (samples + 1, 7, 4), (1, 6, 0), (1, 1, 5), (1, 9, 0)):
        sizes = {s: _size(s, batch, batch if s in first else tokens, past) for s in symbols}
        yield _feeds(file, sizes, (batch, tokens), seed)


def _size(symbol: str, batch: int, tokens: int, past: int) -> int:
    """The size that a dimension's name stands for; ``tokens`` where the name says nothing."""
    word = symbol.lower()
    if "+" in word:
        return sum(_size(part.strip(), batch, tokens, past) for part in word.split("+"))
    if "batch" in word or word in ("b", "n", "bs", "bsz"):
        return batch
    if "total" in word or "mask" in word:
        return past + tokens
    if "past" in word or "cache" in word or "history" in word:
        return past
    return tokens


def _feeds(file: OnnxFile, sizes: Mapping[str, int], rest: tuple[int, int], seed: int) -> GraphFeeds:
    generator = torch.Generator().manual_seed(seed)
    graph = file.proto.graph
    bounds = index_bounds(graph)
    made: GraphFeeds = {}
    for value in graph_inputs(graph):
        dtype, dims = tensor_type(file, value)
        shape = [d if isinstance(d, int) else sizes[d] if d else rest[min(axis, 1)] for axis, d in enumerate(dims)]
        name = value.name.lower()
        if dtype == torch.bool:
            made[value.name] = torch.ones(shape, dtype=dtype)
        elif dtype.is_floating_point:
            drawn = torch.randn(shape, generator=generator)
            made[value.name] = (torch.zeros_like(drawn) if "mask" in name else drawn).to(dtype)
        elif "position" in name and shape:
            made[value.name] = torch.arange(shape[-1], dtype=dtype).expand(shape).contiguous()
        elif value.name in bounds:
            made[value.name] = torch.randint(0, bounds[value.name], shape, generator=generator).to(dtype)
        else:
            made[value.name] = torch.ones(shape, dtype=dtype)
    return made


def index_bounds(graph: OnnxGraph) -> dict[str, int]:
    """For each input that picks rows of a constant: how many rows there are."""
    rows = {t.name: int(t.dims[0]) for t in graph.initializer if len(t.dims)}
    names = {v.name: v.name for v in graph.input}
    bounds: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in _VIEWS and node.input and node.input[0] in names:
            names[node.output[0]] = names[node.input[0]]
        table, at = (node.input[0], node.input[1]) if node.op_type == "Gather" else ("", "")
        if at in names and table in rows and _axis(node) == 0:
            name = names[at]
            bounds[name] = min(bounds.get(name, rows[table]), rows[table])
    return bounds


def _axis(node: OnnxNode) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)


def resized(
    feeds: GraphFeeds, dims: Mapping[str, list[Any]], size_of: Callable[[int], int] = ONE_MORE
) -> GraphFeeds | None:
    """The same inputs with every free size as ``size_of`` says, values repeated; None where none is free or changes."""
    made: GraphFeeds = {}
    changed = False
    for name, value in feeds.items():
        for axis, dim in enumerate(dims[name]):
            if not isinstance(dim, int) and value.shape[axis]:
                size = size_of(value.shape[axis])
                changed |= size != value.shape[axis]
                value = value.index_select(axis, torch.arange(size) % value.shape[axis])
        made[name] = value
    return made if changed else None


def in_tokens(feeds: GraphFeeds, dims: Mapping[str, list[Any]], tokens: int) -> Iterator[GraphFeeds]:
    """The same inputs for so many tokens, values repeated: of one sequence, and of so many sequences of one token.

    Sizes of images are such that their squares are tokens. A size that its name calls that of a cache stays.
    """
    free = [{(axis, d) for axis, d in enumerate(shape) if not isinstance(d, int)} for shape in dims.values()]
    axes = max((len({axis for axis, _ in one if axis}) for one in free), default=0)
    each = max(1, round(tokens ** (1 / max(axes, 1))))
    batches = {d for one in free for axis, d in one if axis == 0 and isinstance(d, str)}
    for batch, length in ((1, each), (tokens, 1)) if axes else ((tokens, tokens),):
        made: GraphFeeds = {}
        for name, value in feeds.items():
            for axis, dim in enumerate(dims[name]):
                if not isinstance(dim, int) and value.shape[axis]:
                    first = dim in batches if isinstance(dim, str) else axis == 0
                    size = _size(dim or "", batch, batch if first else length, value.shape[axis])
                    value = value.index_select(axis, torch.arange(size) % value.shape[axis])
            made[name] = value
        yield made


def sizes_unknown(file: OnnxFile, calls: Sequence[GraphFeeds]) -> str:
    """Why nothing is known of a file on other sizes than one, where it says that it takes others; else ""."""
    dims = {v.name: tensor_type(file, v)[1] for v in graph_inputs(file.proto.graph)}
    free = next((name for name, shape in dims.items() if not all(isinstance(d, int) for d in shape)), None)
    if len(calls) > 1 or free is None:
        return ""
    return (
        f"the file says that sizes of its inputs are free ({shown_line(free)} {dims[free]}), and of those that were "
        f"tried it ran on one alone ({list(calls[0][free].shape)}), so that nobody sees which numbers in it are sizes: "
        "export it with sizes that are fixed, or with shapes that follow the inputs"
    )
